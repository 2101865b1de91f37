import pytest
import torch

from mmlab.training.feature_cache import FeatureCache


class Compute:
    """Features whose size is known: 2**18 floats, one MiB, a picture."""

    def __init__(self):
        self.pictures = 0

    def __call__(self, pixels):
        self.pictures += len(pixels)
        return pixels[:, 0, 0, :1].float() + torch.zeros(len(pixels), 2**18)


def pictures(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)


def of(features: torch.Tensor) -> list[float]:
    assert features.shape[1] == 2**18
    return features[:, 7].tolist()


def test_a_known_picture_is_not_computed_again():
    cache, compute = FeatureCache(10), Compute()
    assert of(cache(["a", "b"], pictures(1, 2), compute)) == [1, 2]
    assert of(cache(["b", "c", "a"], pictures(2, 3, 1), compute)) == [2, 3, 1]
    assert of(cache(["a"], pictures(99), compute)) == [1], "the key says what it is"
    assert compute.pictures == 3


@pytest.mark.parametrize("megabytes", [1, 2, 3])
def test_the_budget_is_kept_and_a_full_cache_is_still_right(megabytes):
    cache, compute = FeatureCache(megabytes), Compute()
    for _ in range(2):
        assert of(cache(list("abcd"), pictures(1, 2, 3, 4), compute)) == [1, 2, 3, 4]
    assert len(cache.entries) == megabytes
    held = sum(entry.untyped_storage().nbytes() for entry in cache.entries.values())
    assert cache.used == held == megabytes * 2**20, "no entry keeps a whole batch alive"
    assert compute.pictures == 4 + 4 - megabytes


def test_a_picture_twice_in_a_batch_is_counted_once():
    cache, compute = FeatureCache(10), Compute()
    assert of(cache(["a", "b", "a"], pictures(1, 2, 1), compute)) == [1, 2, 1]
    assert cache.used == 2 * 2**20 and set(cache.entries) == {"a", "b"}
    assert of(cache(["a", "a"], pictures(1, 1), compute)) == [1, 1]


def test_off_and_empty_batches_pass_through():
    off, compute = FeatureCache(0), Compute()
    for _ in range(2):
        assert of(off(["a"], pictures(1), compute)) == [1]
    assert compute.pictures == 2 and not off.entries
    on = FeatureCache(1)
    assert on([], pictures()[:0], lambda pixels: torch.ones(1, 2)).tolist() == [[1, 1]]


def test_features_carry_no_gradient():
    weight = torch.ones(1, requires_grad=True)
    features = FeatureCache(1)(["a"], pictures(1), lambda pixels: pixels[:, 0, 0].float() * weight)
    assert not features.requires_grad
