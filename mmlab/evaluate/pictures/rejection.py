"""Rejection sampling: of several samples, those with the highest confidence of a classifier are accepted.

Legend: N images, S side, F width of a feature, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmlab.config.errors import DataError
from mmlab.data.bad_samples import sample_errors
from mmlab.data.image_condition import Conditioning
from mmlab.data.sample_types import SampleError
from mmlab.evaluate.config import SampleQualityConfig
from mmlab.evaluate.pictures.drawn_samples import DrawnSamples
from mmlab.evaluate.pictures.feature_networks import FeatureNetwork, features_of
from mmlab.evaluate.pictures.fid import FeatureSet, compare
from mmlab.evaluate.pictures.generators import CodeGenerator, PictureGenerator
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.model.code_sampling import CodeSampler

CAUTION = (
    "The classifier uses the same network as the distances, which flatters accepted_fid and accepted_kid; set"
    " classifier=<another network>."
)
SHRINK = 0.1
"""Share of the mean variance that is added to every direction: small sets do not determine most directions."""


class ClassProbe:
    """Class probabilities of images: a linear discriminant on a network's features, with equal priors.

    It replaces the trained classifier of the papers, and needs only labeled images.

    Args:
        network: computes the features.
        train: images to learn from; those without one of the classes are skipped.
        names: names of the classes, in the order of their numbers.
        batch_size: images at a time.

    Raises:
        DataError: a class without an image.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        train: PictureSet,
        names: Sequence[str],
        batch_size: int = SampleQualityConfig.batch_size,
    ):
        self.network, self.names, self.batch_size = network, list(names), batch_size
        labels_N = labels_of(train, names)
        labels = dict(zip(train.places, labels_N, strict=True))
        for label, name in enumerate(names):
            if not (labels_N == label).any():
                raise DataError(
                    f"{train.index.root} has no image of the class '{name}', so a classifier cannot learn it."
                )
        features_NF = features_of(train, network, batch_size).features.double()
        labels_N = torch.stack([labels[place] for place in train.places])  # of the images that could be decoded
        labeled = labels_N >= 0
        features_NF = features_NF[labeled]
        labels_N = labels_N[labeled]
        means_KF = torch.stack([features_NF[labels_N == label].mean(0) for label in range(len(names))])
        centered = features_NF - means_KF[labels_N]
        spread_FF = centered.T @ centered / len(centered)
        spread_FF += (SHRINK * spread_FF.diagonal().mean() + 1e-12) * torch.eye(len(spread_FF), dtype=torch.float64)
        self.weight_FK = torch.linalg.solve(spread_FF, means_KF.T)
        self.bias_K = -(means_KF.T * self.weight_FK).sum(0) / 2

    def __call__(self, pictures_N3SS: Tensor) -> Tensor:
        """uint8 images → class probabilities, float64 `[N, K]`."""
        rows = [self.network(batch).cpu().double() for batch in pictures_N3SS.split(self.batch_size)]
        return (torch.cat(rows) @ self.weight_FK + self.bias_K).softmax(1)

    def accuracy(self, pictures: PictureSet) -> float:
        """Share of real images that it classifies correctly, of those that have one of its classes."""
        predicted_N = torch.cat([self(batch).argmax(1) for batch in pictures.batches(self.batch_size, "classifying")])
        labels_N = labels_of(pictures, self.names)
        return float((predicted_N == labels_N)[labels_N >= 0].double().mean())


class Rejection:
    """Accepts, of each class, the samples with the highest confidence of a classifier (VQ-VAE-2, arXiv 1906.00446;
    Taming Transformers, section 4.4).

    Args:
        probe: the classifier.
        candidates: samples drawn for each accepted one: 1 / the papers' acceptance rate.
    """

    def __init__(self, probe: ClassProbe, candidates: int):
        self.probe, self.candidates = probe, candidates

    def rows(
        self,
        generator: PictureGenerator,
        draw: Callable[[Any, int], DrawnSamples],
        first: DrawnSamples,
        real: FeatureSet,
    ) -> tuple[dict[str, float], DrawnSamples]:
        """Scores of samples drawn in other ways than `first`, and the accepted samples.

        Args:
            generator: draws the samples.
            draw: (a generator, n) → its n-th set of samples, under the conditions of `first`.
            first: the set with n = 0, without rejection.
            real: features that samples are compared with.

        Returns:
            `all_codes_…`: scores without top-k and nucleus sampling, if the sampler has them; `accepted_…`;
            `confidence` and `accepted_confidence`: the classifier's mean confidence before and after rejection.
        """
        scores: dict[str, float] = {}
        if (whole := of_all_codes(generator)) is not None:
            scores |= {f"all_codes_{name}": value for name, value in compare(draw(whole, 0).features, real).items()}
        accepted, confidence_N = first, self.confidence(first)
        scores["confidence"] = float(confidence_N.mean())
        for number in range(1, self.candidates):
            accepted, confidence_N = self.better(accepted, confidence_N, draw(generator, number))
        scores |= {f"accepted_{name}": value for name, value in compare(accepted.features, real).items()}
        return scores | {"accepted_confidence": float(confidence_N.mean())}, accepted

    def describe(self, network: FeatureNetwork, pictures: PictureSet) -> dict[str, Any]:
        """Acceptance rate, the classifier and its accuracy on real images, and a caution if it flatters distances."""
        about = self.probe.network.describe()
        same = about["hash"] == network.describe()["hash"]
        return {
            "candidates": self.candidates,
            "acceptance": 1 / self.candidates,
            "accuracy": self.probe.accuracy(pictures),
            "classifier": f"linear discriminant on: {about['network']}",
            "hash": about["hash"],
            "caution": CAUTION if same else None,
        }

    def confidence(self, samples: DrawnSamples) -> Tensor:
        """The classifier's probability of each sample's own class, float64 `[N]`."""
        labels_N = torch.tensor([self.probe.names.index(name) for name in samples.labels])
        return self.probe(samples.pictures).gather(1, labels_N[:, None])[:, 0]

    def better(self, ours: DrawnSamples, confidence_N: Tensor, more: DrawnSamples) -> tuple[DrawnSamples, Tensor]:
        """The best of two sets of samples under the same conditions, as many of each class as in one of them."""
        pictures, features, other_features = ours.pictures.clone(), ours.features.features, more.features.features
        confidence_N, other_N = confidence_N.clone(), self.confidence(more)
        for name in set(ours.labels):
            places = torch.tensor([n for n, label in enumerate(ours.labels) if label == name])
            both = torch.cat([confidence_N[places], other_N[places]])
            best = both.argsort(descending=True, stable=True)[: len(places)]
            pictures[places] = torch.cat([pictures[places], more.pictures[places]])[best]
            features[places] = torch.cat([features[places], other_features[places]])[best]
            confidence_N[places] = both[best]
        chosen = FeatureSet()
        chosen.add(features)
        return DrawnSamples(pictures, ours.labels, chosen), confidence_N


def of_all_codes(generator: PictureGenerator) -> CodeGenerator | None:
    """The generator without top-k and nucleus sampling; None if it has neither, or is a diffusion model's."""
    if not isinstance(generator, CodeGenerator):
        return None
    config = generator.sampler.config
    whole = replace(config, top_k=None, top_p=None)
    return None if whole == config else replace(generator, sampler=CodeSampler(whole))


def labels_of(pictures: PictureSet, names: Sequence[str]) -> Tensor:
    """The number of each image's class, int64 `[N]`; -1 if it has none of these."""
    read = Conditioning(names)
    return torch.tensor([_label(read, pictures, n) for n in range(len(pictures))])


def _label(read: Conditioning, pictures: PictureSet, n: int) -> int:
    try:
        with sample_errors():
            return int(read(pictures.sample(n))[0]["labels"])
    except SampleError:
        return -1
