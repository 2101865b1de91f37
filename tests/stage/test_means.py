import pytest
import scipy.stats
import torch

from mmlab.stage.latents import LatentMoments
from mmlab.stage.means import Means


def test_each_sample_counts_once_whatever_its_batch():
    means, values = Means(), torch.tensor([1.0, 2, 3, 4, 10])
    for part in values.split([3, 1, 1]):
        means.add_means({"a": part.mean(), "b": -part.mean()}, len(part))
    assert means.finish(1) == (pytest.approx({"a": 4.0, "b": -4.0}), 5)
    assert means.finish(1) == ({"a": 0.0, "b": 0.0}, 0)


def test_sums_are_divided_by_their_tokens_and_it_starts_again():
    means = Means("loss")
    means.add({"loss": torch.tensor(6.0)}, 2)
    means.add({"loss": torch.tensor(4.0)}, 8)
    assert means.finish(1) == ({"loss": 1.0}, 10.0)
    means.add({"loss": torch.tensor(3.0)}, 1)
    assert means.finish(1) == ({"loss": 3.0}, 1.0)
    assert means.finish(1) == Means("loss").finish(1) == ({"loss": 0.0}, 0.0), "no batch at all: not a division by zero"


def test_values_are_not_mixed_up():
    means = Means()
    means.add({"a": torch.tensor(1.0)}, 1)
    with pytest.raises(ValueError, match="cannot take"):
        means.add({"b": torch.tensor(1.0)}, 1)


def test_moments_are_scipy_s_per_channel_whatever_the_batches():
    torch.manual_seed(0)
    z = torch.randn(6, 3, 4, 4).pow(3) * torch.tensor([1.0, 30, 0.1]).view(3, 1, 1) + torch.tensor([0, 50.0, 1]).view(
        3, 1, 1
    )
    moments = LatentMoments()
    for part in z.split([1, 3, 2]):
        moments.add(part)
    found = moments.finish(1, torch.device("cpu"))
    flat = z.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.mean, flat.mean(1))
    torch.testing.assert_close(found.std, flat.std(1, correction=0))
    kurtosis = torch.from_numpy(scipy.stats.kurtosis(flat.numpy(), axis=1, fisher=False))
    torch.testing.assert_close(found.kurtosis, kurtosis, rtol=1e-5, atol=0)
