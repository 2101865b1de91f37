"""The bias of few images in a Fréchet distance, compared with distributions whose distance is known."""

import pytest
import torch

from mmlab.evaluate.pictures.fid import FeatureSet, compare, distances
from mmlab.evaluate.pictures.fid_bias import FEWEST, caution, extrapolated


def drawn(count: int, width: int, seed: int, mean: float = 0.0) -> FeatureSet:
    """Features of a normal distribution with decaying variances."""
    spread = torch.logspace(0, -1, width, dtype=torch.float64)
    normal = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    features = FeatureSet()
    features.add(mean + normal * spread)
    return features


def test_the_distance_of_unlimited_samples_is_estimated():
    width, mean = 16, 0.1
    reference = drawn(20_000, width, 0)
    true = width * mean**2
    for seed in range(1, 4):
        samples = drawn(100, width, seed, mean)
        biased, found = distances(samples, reference)["fid"], extrapolated(samples, reference)
        assert biased - true > 0.08, "what is to be removed"
        assert found["fid_infinity"] == pytest.approx(true, abs=0.6 * (biased - true))
        assert found["fid_infinity"] + found["fid_bias"] == pytest.approx(biased, rel=1e-6)
        assert found["fid_reference_bias"] < 0.1 * found["fid_bias"]
    assert all(extrapolated(samples, reference) == found for _ in range(20)), "no seed, and the same bits"


def test_few_references_have_a_bias_of_their_own():
    one, other = drawn(4_000, 16, 1), drawn(200, 16, 2)
    found, exchanged = extrapolated(one, other), extrapolated(other, one)
    assert found["fid_reference_bias"] > 5 * found["fid_bias"]
    assert exchanged["fid_bias"] == pytest.approx(found["fid_reference_bias"], rel=1e-9)


def test_a_handful_of_images_has_no_line():
    assert extrapolated(drawn(FEWEST - 1, 2, 1), drawn(50, 2, 2)) == {}
    assert extrapolated(drawn(FEWEST, 2, 1), drawn(FEWEST, 2, 2)).keys() == {
        *("fid_infinity", "fid_bias", "fid_reference_bias")
    }


def test_the_caution_depends_on_the_width_of_features_and_has_the_size_of_the_bias():
    assert caution({}, drawn(50, 10, 1), drawn(60, 10, 2)) is None
    few, many = drawn(49, 10, 1), drawn(60, 10, 2)
    scores = compare(few, many) | extrapolated(few, many)
    sentence = caution(scores, many, few)
    assert sentence and "49 images" in sentence and "50 or more" in sentence and "roughly" not in sentence
    assert f"by {scores['fid_bias']:.3g} (few samples)" in sentence
    assert f"unlimited samples would have {scores['fid_infinity']:.4g}" in sentence
    fewer = drawn(19, 10, 1)
    assert "very roughly" in str(caution(extrapolated(fewer, many) | {"fid": 1.0}, fewer, many))
    for unknown in ({}, scores | {"fid_bias": -1.0}):
        assert "biased upwards: 49 images" in str(caution(unknown, few, many))
