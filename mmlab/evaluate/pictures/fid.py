"""Distances between two sets of images, computed from their features: FID, KID and nearest neighbors.

All sums are in float64. Legend: N, M images, F width of a feature.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmlab.config.errors import RunError
from mmlab.evaluate.pictures.precision_recall import precision_recall

SUBSETS, SUBSET_SIZE = 100, 1000
"""Subsets of the kernel distance, as in the paper's experiments (arXiv 1801.01401, section 4)."""
ENOUGH = 5
"""Images per feature below which a Fréchet distance is reported with a warning: the authors of FID recommend 10,000 for
Inception's 2,048 features (README of bioinf-jku/TTUR)."""


class Moments:
    """Mean and covariance of a stream of features, merged batch by batch without cancellation (Chan et al., 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, features_NF: Tensor) -> None:
        """Add N ≥ 1 features of any float dtype.

        Raises:
            RunError: a value that is not finite.
        """
        features = features_NF.detach().cpu().double()
        if not features.isfinite().all():
            raise RunError("The feature network returned values that are not finite; check the images and its weights.")
        count, mean = len(features), features.mean(0)
        centered = features - mean
        scatter = centered.T @ centered
        if self.count:
            total, moved = self.count + count, mean - self.mean
            scatter = self._scatter + scatter + torch.outer(moved, moved) * (self.count * count / total)
            mean = self.mean + moved * (count / total)
        self.count, self.mean, self._scatter = self.count + count, mean, scatter

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance, float64 `[F, F]`.

        Raises:
            RunError: fewer than two images.
        """
        if self.count < 2:
            raise RunError(f"A covariance needs at least two images; there are {self.count}.")
        return self._scatter / (self.count - 1)


class FeatureSet:
    """The features of a set of images, with their moments.

    Attributes:
        moments: of all features so far.
    """

    def __init__(self) -> None:
        self.moments = Moments()
        self._batches: list[Tensor] = []

    def __len__(self) -> int:
        return self.moments.count

    def add(self, features_NF: Tensor) -> None:
        """Add N ≥ 1 features; raises RunError if one is not finite."""
        self.moments.add(features_NF)
        self._batches.append(features_NF.detach().float().cpu())

    @property
    def features(self) -> Tensor:
        """All features, float32 `[N, F]`, in the order of `add`."""
        return torch.cat(self._batches)


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over `subsets` subsets of `size` images of each set."""

    mean: float
    std: float
    subsets: int
    size: int


def frechet_distance(mean_F: Tensor, covariance_FF: Tensor, other_mean_F: Tensor, other_covariance_FF: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians: |μ₁−μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) (arXiv 1706.08500, equation 6).

    tr (Σ₁Σ₂)^½ is the sum of the roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric: there is no complex
    square root, and singular covariances (fewer images than features) need no correction.
    """
    return frechet_from(Root(mean_F, covariance_FF), other_mean_F, other_covariance_FF)


class Root:
    """A Gaussian with the root of its covariance, from which several Fréchet distances are computed."""

    def __init__(self, mean_F: Tensor, covariance_FF: Tensor):
        self.mean, self.covariance = mean_F.double(), covariance_FF.double()
        values, vectors = torch.linalg.eigh(self.covariance)
        self.root = vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_from(one: Root, other_mean_F: Tensor, other_covariance_FF: Tensor) -> float:
    """`frechet_distance` of a Gaussian whose root is known."""
    shared = torch.linalg.eigvalsh(one.root @ other_covariance_FF.double() @ one.root).clamp(min=0).sqrt().sum()
    apart = (one.mean - other_mean_F.double()).square().sum()
    return float(apart + one.covariance.trace() + other_covariance_FF.double().trace() - 2 * shared)


def kernel_distance(
    x_NF: Tensor, y_MF: Tensor, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0
) -> KernelDistance:
    """Kernel Inception distance: the squared maximum mean discrepancy under the kernel (x·y/F + 1)³ (arXiv 1801.01401).

    Its estimator is unbiased: for two sets of one distribution the expectation is 0, however few the images, and single
    values may be negative. Sets of at most `size` images are compared as a whole, once.

    Args:
        x_NF, y_MF: features.
        subsets: number of subsets, each drawn without repetition.
        size: images of a subset; fewer if a set has fewer.
        seed: of the draw.

    Raises:
        RunError: fewer than two images in a set.
    """
    x, y = x_NF.cpu().double(), y_MF.cpu().double()
    smaller, larger = sorted((len(x), len(y)))
    if smaller < 2:
        raise RunError(f"A kernel distance needs at least two images in each set, not {len(x)} and {len(y)}.")
    if larger <= size:
        return KernelDistance(_discrepancy(x, y), 0.0, 1, smaller)
    size = min(size, smaller)
    draw = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        rows = (torch.randperm(len(each), generator=draw)[:size] for each in (x, y))
        values.append(_discrepancy(*(each[row] for each, row in zip((x, y), rows, strict=True))))
    distances = torch.tensor(values, dtype=torch.float64)
    return KernelDistance(float(distances.mean()), float(distances.std(unbiased=False)), subsets, size)


def _discrepancy(x_NF: Tensor, y_MF: Tensor) -> float:
    """Unbiased estimate of the squared discrepancy: no image is compared with itself."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k, n = kernel(a, a), len(a)
        return (k.sum() - k.trace()) / (n * (n - 1))

    return float(within(x_NF) + within(y_MF) - 2 * kernel(x_NF, y_MF).mean())


def nearest(x_NF: Tensor, y_MF: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """For each x the Euclidean distance to the nearest y, float32 `[N]`, and its index, int64 `[N]`.

    Differences are squared and summed without a matrix product, so that a copy is at distance 0.
    """
    exact = "donot_use_mm_for_euclid_dist"
    rows = [torch.cdist(part, y_MF, compute_mode=exact).min(1) for part in x_NF.float().split(chunk)]
    return torch.cat([row.values for row in rows]), torch.cat([row.indices for row in rows])


def distances(pictures: FeatureSet, reference: FeatureSet) -> dict[str, float]:
    """Fréchet and kernel distance of two sets of images: `{fid, kid, kid_std}`."""
    ours, theirs = pictures.moments, reference.moments
    kernel = kernel_distance(pictures.features, reference.features)
    distance = frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
    return {"fid": distance, "kid": kernel.mean, "kid_std": kernel.std}


def compare(pictures: FeatureSet, reference: FeatureSet) -> dict[str, float]:
    """`distances`, and `{precision, recall}` of sets of more than three images."""
    return distances(pictures, reference) | precision_recall(pictures.features, reference.features)
