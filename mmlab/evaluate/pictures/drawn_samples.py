"""Samples of a generative model under the conditions of real images, with the features of both and of noise."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmlab.config.errors import DataError
from mmlab.data.formats import MAP
from mmlab.data.image_collate import map_of
from mmlab.data.image_condition import Conditioning
from mmlab.data.progress_bar import progress
from mmlab.data.sample_types import SampleError
from mmlab.evaluate.config import SampleQualityConfig
from mmlab.evaluate.pictures.feature_networks import FeatureNetwork
from mmlab.evaluate.pictures.fid import FeatureSet
from mmlab.evaluate.pictures.generators import PictureGenerator, ranges
from mmlab.evaluate.pictures.picture_set import PictureSet


class PictureConditions:
    """Conditions of `count` samples, taken from a set of images: spread evenly over it, or all of it in turn.

    Args:
        model: a generative model, whose conditioner reads them.
        pictures: images with records; those without a class, caption or map that the model can use are skipped.
        count: number of samples that will be drawn.

    Raises:
        DataError: no image has one.
    """

    def __init__(self, model: Any, pictures: PictureSet, count: int):
        conditioner: Any = model.conditioner
        self.pictures, self.maps = pictures, conditioner.reads == "map"
        classes = conditioner.names if conditioner.reads == "class" else None
        text = conditioner.reads == "text"
        read = Conditioning(classes, *((conditioner.tokenizer, conditioner.max_length) if text else ()))
        rows: list[tuple[int, dict[str, Tensor], str]] = []  # place in the set, inputs of the conditioner, label
        fault = ""
        for n in range(len(pictures)):
            sample = pictures.sample(n)
            try:
                if self.maps and MAP not in sample.members:
                    raise SampleError("no-map", f"The sample has no {MAP}.")
                inputs, _ = read(sample)
            except SampleError as error:
                fault = str(error)
                continue
            caption = str(sample.record.get("caption") or "") if text else ""
            rows.append((n, inputs, caption if classes is None else classes[int(inputs["labels"])]))
        if not rows:
            raise DataError(f"{pictures.index.root} has no condition for the model; its last sample: {fault}")
        # Shards are often sorted by class: the first images would be of one.
        self.rows = [rows[n * len(rows) // count if count < len(rows) else n % len(rows)] for n in range(count)]

    def __call__(self, start: int, stop: int) -> tuple[dict[str, Tensor], list[str]]:
        """(inputs of the conditioner, labels) of the samples `start` … `stop` - 1."""
        places, inputs, labels = zip(*self.rows[start:stop], strict=True)
        fields = {name: torch.stack([row[name] for row in inputs]) for name in inputs[0]}
        if self.maps:
            # Maps are read when they are needed: those of a large set would not fit in memory.
            fields["map_pixels"] = torch.stack([self._map(n) for n in places])
        return fields, list(labels)

    def _map(self, n: int) -> Tensor:
        """The n-th image's map, uint8 `[3, S, S]`; raises DataError if it cannot be decoded."""
        try:
            return map_of(self.pictures.sample(n).members, self.pictures.spec)
        except SampleError as error:
            where = f"{self.pictures.index.root}: the map of sample {self.pictures.key(n)}"
            raise DataError(f"{where} cannot be used: {error}") from error


@dataclass(frozen=True)
class DrawnSamples:
    """Samples of a model.

    Attributes:
        pictures: uint8 `[N, 3, S, S]`.
        labels: N texts, what each was to show.
        features: of the samples.
    """

    pictures: Tensor
    labels: list[str]
    features: FeatureSet


def draw_samples(
    generator: PictureGenerator,
    conditions: PictureConditions,
    network: FeatureNetwork,
    count: int,
    batch_size: int = SampleQualityConfig.batch_size,
    seed: int = 0,
) -> DrawnSamples:
    """Draw `count` samples, the n-th with the seed `seed` + n, and compute their features."""
    pictures: list[Tensor] = []
    labels: list[str] = []
    features = FeatureSet()
    for start, stop in progress(ranges(count, batch_size), "drawing samples", -(-count // batch_size)):
        inputs, names = conditions(start, stop)
        pictures.append(generator(inputs, list(range(seed + start, seed + stop))))
        labels += names
        features.add(network(pictures[-1]))
    return DrawnSamples(torch.cat(pictures), labels, features)


def noise_features(
    generator: PictureGenerator,
    network: FeatureNetwork,
    count: int,
    batch_size: int = SampleQualityConfig.batch_size,
    seed: int = 0,
) -> FeatureSet:
    """The features of the decoded noise that as many samples start from: the baseline of an untrained model."""
    features = FeatureSet()
    for start, stop in ranges(count, batch_size):
        features.add(network(generator.decode(generator.noise(list(range(seed + start, seed + stop))))))
    return features
