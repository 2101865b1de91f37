"""Rejection sampling: of several samples those are kept that a classifier is surest of.

Legend: N pictures, S side, F width of a feature, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmlab.config.errors import DataError
from mmlab.data.image_condition import Conditioning
from mmlab.data.sample import Sample, SampleError
from mmlab.evaluate.pictures.drawn_samples import Drawn, features_of
from mmlab.evaluate.pictures.feature_networks import FeatureNetwork
from mmlab.evaluate.pictures.fid import FeatureSet, compare
from mmlab.evaluate.pictures.generators import CodeGenerator, PictureGenerator
from mmlab.evaluate.pictures.picture_set import PictureSet

CAUTION = (
    "The classifier sees by the network that the distances are taken in, which flatters accepted_fid and accepted_kid;"
    " give classifier=<another network>."
)
SHRINK = 0.1
"""Of the mean variance, added to every direction's: small sets know nothing of most directions."""


class ClassProbe:
    """How likely a picture is of a class: a linear discriminant on a network's features, all classes equally likely.

    It stands where the papers have a trained classifier, and needs nothing but labelled pictures.

    Args:
        network: gives the features.
        train: pictures to learn from; those without a class that is asked for are passed over.
        names: of the classes, in the order of their numbers.
        batch_size: pictures at a time.

    Raises:
        DataError: a class without a picture.
    """

    def __init__(self, network: FeatureNetwork, train: PictureSet, names: Sequence[str], batch_size: int = 64):
        self.network, self.names, self.batch_size = network, list(names), batch_size
        labels_N = labels_of(train, names)
        for label, name in enumerate(names):
            if not (labels_N == label).any():
                raise DataError(f"{train.index.root} has no picture of the class '{name}', so nothing can tell it.")
        known = labels_N >= 0
        features_NF = features_of(train, network, batch_size).features.double()[known]
        labels_N = labels_N[known]
        means_KF = torch.stack([features_NF[labels_N == label].mean(0) for label in range(len(names))])
        centred = features_NF - means_KF[labels_N]
        spread_FF = centred.T @ centred / len(centred)
        spread_FF += (SHRINK * spread_FF.diagonal().mean() + 1e-12) * torch.eye(len(spread_FF), dtype=torch.float64)
        self.weight_FK = torch.linalg.solve(spread_FF, means_KF.T)
        self.bias_K = -(means_KF.T * self.weight_FK).sum(0) / 2

    def __call__(self, pictures_N3SS: Tensor) -> Tensor:
        """uint8 pictures → how likely each class is, float64 `[N, K]`."""
        rows = [self.network(batch).cpu().double() for batch in pictures_N3SS.split(self.batch_size)]
        return (torch.cat(rows) @ self.weight_FK + self.bias_K).softmax(1)

    def accuracy(self, pictures: PictureSet) -> float:
        """The share of real pictures that it takes for their class, of those that have one of its classes."""
        labels_N = labels_of(pictures, self.names)
        found = torch.cat([self(batch).argmax(1) for batch in pictures.batches(self.batch_size, "classifying")])
        return float((found == labels_N)[labels_N >= 0].double().mean())


class Rejection:
    """Keeps, of each class, the samples that a classifier is surest of (VQ-VAE-2, arXiv 1906.00446; Taming
    Transformers, section 4.4).

    Args:
        probe: the classifier.
        candidates: samples drawn for each that is kept: the papers' acceptance rate is one over it.
    """

    def __init__(self, probe: ClassProbe, candidates: int):
        self.probe, self.candidates = probe, candidates

    def rows(
        self, generator: PictureGenerator, draw: Callable[[Any, int], Drawn], first: Drawn, real: FeatureSet
    ) -> tuple[dict[str, float], Drawn]:
        """Scores of other ways to sample, beside those of `first`; and the samples that are accepted.

        Args:
            generator: the model that draws.
            draw: (a generator, n) → its n-th drawing of samples, under the conditions of `first`.
            first: the drawing with n = 0, of which no sample was rejected.
            real: features that samples are compared with.

        Returns:
            `all_codes_…` where the sampler leaves codes out (top-k, nucleus), without that; `accepted_…`; `confidence`
            and `accepted_confidence`, how sure the classifier is of the samples' classes before and after.
        """
        scores: dict[str, float] = {}
        if (whole := of_all_codes(generator)) is not None:
            scores |= {f"all_codes_{name}": value for name, value in compare(draw(whole, 0).features, real).items()}
        kept, sure_N = first, self.sure(first)
        scores["confidence"] = float(sure_N.mean())
        for number in range(1, self.candidates):
            kept, sure_N = self.better(kept, sure_N, draw(generator, number))
        scores |= {f"accepted_{name}": value for name, value in compare(kept.features, real).items()}
        return scores | {"accepted_confidence": float(sure_N.mean())}, kept

    def describe(self, network: FeatureNetwork, pictures: PictureSet) -> dict[str, Any]:
        """How many are rejected, by what, how good that is on real pictures, and whether it flatters the distances."""
        seen = self.probe.network.describe()
        same = seen["hash"] == network.describe()["hash"]
        return {
            "candidates": self.candidates,
            "acceptance": 1 / self.candidates,
            "accuracy": self.probe.accuracy(pictures),
            "classifier": f"linear discriminant on: {seen['network']}",
            "hash": seen["hash"],
            "caution": CAUTION if same else None,
        }

    def sure(self, drawn: Drawn) -> Tensor:
        """How likely each sample is of the class that it was told, float64 `[N]`."""
        labels_N = torch.tensor([self.probe.names.index(name) for name in drawn.told])
        return self.probe(drawn.pictures).gather(1, labels_N[:, None])[:, 0]

    def better(self, kept: Drawn, sure_N: Tensor, more: Drawn) -> tuple[Drawn, Tensor]:
        """The surest of two drawings of the same conditions, as many of each class as one has."""
        pictures, features, other_features = kept.pictures.clone(), kept.features.features, more.features.features
        sure_N, other_N = sure_N.clone(), self.sure(more)
        for name in set(kept.told):
            places = torch.tensor([n for n, told in enumerate(kept.told) if told == name])
            both = torch.cat([sure_N[places], other_N[places]])
            best = both.argsort(descending=True, stable=True)[: len(places)]
            pictures[places] = torch.cat([pictures[places], more.pictures[places]])[best]
            features[places] = torch.cat([features[places], other_features[places]])[best]
            sure_N[places] = both[best]
        found = FeatureSet()
        found.add(features)
        return Drawn(pictures, kept.told, found), sure_N


def of_all_codes(generator: PictureGenerator) -> CodeGenerator | None:
    """The generator drawing from all codes; None where it does already, or takes noise away."""
    if not isinstance(generator, CodeGenerator):
        return None
    whole = replace(generator.sampler, top_k=None, top_p=None)
    return None if whole == generator.sampler else replace(generator, sampler=whole)


def labels_of(pictures: PictureSet, names: Sequence[str]) -> Tensor:
    """The number of each picture's class, int64 `[N]`; -1 where it has none of these."""
    read = Conditioning(names)
    return torch.tensor([_label(read, pictures.sample(n)) for n in range(len(pictures))])


def _label(read: Conditioning, sample: Sample) -> int:
    try:
        return int(read(sample)[0]["labels"])
    except SampleError:
        return -1
