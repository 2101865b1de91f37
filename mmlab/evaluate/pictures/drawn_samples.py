"""Samples of a generative model under the conditions of real images, with the features of both and of noise."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmlab.config.errors import DataError
from mmlab.data.bad_samples import sample_errors
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
        words = (conditioner.tokenizer, conditioner.max_length, conditioner.vocabulary) if text else ()
        read = Conditioning(classes, *words)
        # Place in the index, inputs of the conditioner, and label of each.
        rows: list[tuple[int, dict[str, Tensor], str]] = []
        fault, self.truncated = "", 0
        for n, place in enumerate(pictures.places):
            try:
                with sample_errors():
                    sample = pictures.sample(n)
                    if self.maps and MAP not in sample.members:
                        raise SampleError("no-map", f"The sample has no {MAP}.")
                    inputs, counters = read(sample)
            except SampleError as error:
                fault = str(error)
                continue
            self.truncated += counters.get("truncated", 0)
            caption = str(sample.record.get("caption") or "") if text else ""
            rows.append((place, inputs, caption if classes is None else classes[int(inputs["labels"])]))
        if not rows:
            raise DataError(f"{pictures.index.root} has no condition for the model; its last sample: {fault}")
        # Shards are often sorted by class: the first images would be of one.
        chosen = [n * len(rows) // count if count < len(rows) else n % len(rows) for n in range(count)]
        self.rows = [self._with_map(rows, n) if self.maps else rows[n] for n in chosen]

    def __call__(self, start: int, stop: int) -> tuple[dict[str, Tensor], list[str]]:
        """(inputs of the conditioner, labels) of the samples `start` … `stop` - 1."""
        places, inputs, labels = zip(*self.rows[start:stop], strict=True)
        fields = {name: torch.stack([row[name] for row in inputs]) for name in inputs[0]}
        if self.maps:
            # Maps are read again when they are needed: those of a large set would not fit in memory.
            fields["map_pixels"] = torch.stack([self._map(place) for place in places])
        return fields, list(labels)

    def _with_map(self, rows: list[Any], n: int) -> Any:
        """The n-th row, or the next one after it whose map can be decoded; raises DataError if there is none."""
        for row in [*rows[n:], *rows[:n]]:
            with self.pictures.bad.left_out(str(self.pictures.index.keys[row[0]])):
                self._map(row[0])
                return row
        self.pictures.bad.refuse_all("maps")

    def _map(self, place: int) -> Tensor:
        """The map of the image at a place of the index, uint8 `[3, S, S]`; raises what `map_of` raises."""
        return map_of(self.pictures.index.read(place, (MAP,)), self.pictures.spec)


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
