"""Distances of sets of images, compared with closed forms, scipy, and explicit sums."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from mmlab.config.errors import RunError
from mmlab.evaluate.pictures.fid import (
    FeatureSet,
    Moments,
    compare,
    distances,
    frechet_distance,
    kernel_distance,
    nearest,
)


def normal(count: int, width: int, seed: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + std * drawn


def spread(width: int, seed: int) -> torch.Tensor:
    """A covariance without structure."""
    factor = normal(width + 3, width, seed)
    return factor.T @ factor / width


def test_frechet_of_gaussians_on_the_axes_is_the_closed_form():
    mean, other = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([3.0, 1.0, 2.0])
    std, other_std = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([2.0, 0.0, 0.5])
    found = frechet_distance(mean, torch.diag(std**2), other, torch.diag(other_std**2))
    assert found == pytest.approx(9 + 16 + 1 + 4, abs=1e-9)


@pytest.mark.parametrize("width", [2, 7, 40])
def test_frechet_agrees_with_scipys_square_root(width):
    covariances = spread(width, 1), spread(width, 2)
    means = normal(2, width, 3)
    root = sqrtm((covariances[0] @ covariances[1]).numpy())
    expected = float((means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances))
    expected -= 2 * np.trace(np.real(root))
    found = frechet_distance(means[0], covariances[0], means[1], covariances[1])
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_is_symmetric_and_zero_of_itself_also_where_singular():
    few = normal(5, 20, 4)  # rank 4
    moments = Moments()
    moments.add(few)
    again = frechet_distance(moments.mean, moments.covariance, moments.mean, moments.covariance)
    assert again == pytest.approx(0, abs=1e-6)
    other = spread(20, 5)
    there = frechet_distance(moments.mean, moments.covariance, torch.zeros(20), other)
    back = frechet_distance(torch.zeros(20), other, moments.mean, moments.covariance)
    assert there == pytest.approx(back, rel=1e-7) and there > 0


def test_streaming_equals_one_shot():
    # A mean far from zero: sums of squares would lose the variance.
    features = normal(501, 6, 6, mean=1e6, std=0.01)
    moments, whole = Moments(), FeatureSet()
    for part in features.split([1, 200, 3, 297]):
        moments.add(part)
        whole.add(part)
    assert moments.count == len(whole) == 501
    assert np.allclose(moments.mean, features.mean(0), rtol=1e-14)
    assert np.allclose(moments.covariance, np.cov(features.numpy().T), rtol=1e-6)
    assert whole.features.dtype == torch.float32 and torch.equal(whole.features, features.float())


def written_out(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    def within(z):
        return np.mean([kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])

    return within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_the_kernel_distance_is_the_papers_sum():
    x, y = normal(9, 4, 7), normal(6, 4, 8, mean=0.5)
    assert kernel_distance(x, y).mean == pytest.approx(written_out(x.numpy(), y.numpy()), rel=1e-10)


def test_the_kernel_distance_has_no_bias():
    """Over many small draws of one distribution its mean is 0 within its error; with the diagonal it would be 0.8."""
    found = torch.tensor([kernel_distance(normal(20, 8, 2 * i), normal(20, 8, 2 * i + 1)).mean for i in range(300)])
    error = found.std() / 300**0.5
    assert abs(found.mean()) < 3 * error and error < 0.02
    assert (found < 0).float().mean() > 0.3


def test_the_kernel_distance_of_shifted_normals_is_the_closed_form():
    # In one dimension (xy + 1)³ compares moments: Σ binomial(3, k) (E xᵏ − E yᵏ)² = 3·1 + 3·1 + 16 for N(0,1), N(1,1).
    found = kernel_distance(normal(20_000, 1, 9), normal(20_000, 1, 10, mean=1.0), subsets=60)
    assert found.subsets == 60 and found.size == 1000 and found.std > 0
    assert found.mean == pytest.approx(22, abs=4 * found.std / 60**0.5)


def test_subsets_are_drawn_by_the_seed():
    x, y = normal(1500, 3, 11), normal(1200, 3, 12)
    first, again, other = (kernel_distance(x, y, subsets=2, seed=seed).mean for seed in (0, 0, 1))
    assert first == again != other


def test_nearest_finds_copies_at_distance_zero():
    train = normal(300, 5, 13, mean=1000.0).float()
    distances, places = nearest(torch.cat([train[[250, 3]], train[[7]] + 3.0]), train, chunk=2)
    assert places.tolist()[:2] == [250, 3] and distances.tolist()[:2] == [0.0, 0.0]
    assert distances[2] == (train[7] + 3.0 - train[places[2]]).norm() > 0
    assert distances[2] == pytest.approx(min(float((train[7] + 3.0 - row).norm()) for row in train))


def filled(features: torch.Tensor) -> FeatureSet:
    made = FeatureSet()
    made.add(features)
    return made


def test_compare_puts_both_distances_together():
    x, y = normal(900, 4, 14), normal(1000, 4, 15, mean=2.0)
    found = compare(filled(x), filled(y))
    assert found["fid"] == pytest.approx(16, rel=0.1)
    assert found["kid"] == pytest.approx(kernel_distance(x, y).mean, rel=1e-4)
    assert 0.3 < found["precision"] < 0.9 and 0.3 < found["recall"] < 0.9, "the tails of the two overlap"
    assert distances(filled(x), filled(y)).items() <= found.items()
    assert compare(filled(x), filled(x))["fid"] == pytest.approx(0, abs=1e-9)


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(RunError, match="not finite"):
        Moments().add(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(RunError, match="at least two images; there are 1"):
        _ = filled(normal(1, 2, 1)).moments.covariance
    with pytest.raises(RunError, match="at least two images"):
        kernel_distance(normal(1, 2, 1), normal(4, 2, 1))
