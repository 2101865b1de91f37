"""Samples of a generative model, and the features of them, of noise and of real pictures."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmlab.data.progress_bar import progress
from mmlab.evaluate.pictures.feature_networks import FeatureNetwork
from mmlab.evaluate.pictures.fid import FeatureSet
from mmlab.evaluate.pictures.generators import BorrowedConditions, PictureGenerator, ranges
from mmlab.evaluate.pictures.picture_set import PictureSet


@dataclass(frozen=True)
class Drawn:
    """Samples of a model.

    Attributes:
        pictures: uint8 `[N, 3, S, S]`.
        told: N texts, what each was to show.
        features: of the samples.
    """

    pictures: Tensor
    told: list[str]
    features: FeatureSet


def draw_samples(
    generator: PictureGenerator,
    conditions: BorrowedConditions,
    network: FeatureNetwork,
    count: int,
    batch_size: int = 64,
    seed: int = 0,
) -> Drawn:
    """Draw `count` samples, the n-th with the seed `seed` + n, and take their features."""
    pictures: list[Tensor] = []
    told: list[str] = []
    features = FeatureSet()
    for start, stop in progress(ranges(count, batch_size), "drawing samples", -(-count // batch_size)):
        seeds = list(range(seed + start, seed + stop))
        given, names = conditions(start, stop)
        pictures.append(generator(given, seeds))
        told += names
        features.add(network(pictures[-1]))
    return Drawn(torch.cat(pictures), told, features)


def noise_features(
    generator: PictureGenerator, network: FeatureNetwork, count: int, batch_size: int = 64, seed: int = 0
) -> FeatureSet:
    """The features of the noise that as many samples start from, decoded: what an untrained model is worth."""
    found = FeatureSet()
    for start, stop in ranges(count, batch_size):
        found.add(network(generator.decode(generator.noise(list(range(seed + start, seed + stop))))))
    return found


def features_of(pictures: PictureSet, network: FeatureNetwork, batch_size: int = 64) -> FeatureSet:
    """The features of real pictures."""
    found = FeatureSet()
    for batch in pictures.batches(batch_size, f"reading {pictures.index.root.name}"):
        found.add(network(batch))
    return found
