from fractions import Fraction

import pytest

from mmlab.config.errors import ConfigError
from mmlab.data.mixture import Mixture, Sequential


@pytest.mark.parametrize(
    ("sizes", "weights", "bound"),
    [
        ([10], None, Fraction(0)),
        ([5, 3], None, Fraction(1, 2)),
        ([10, 10, 10], [0.5, 0.3, 0.2], Fraction(1)),
        ([7, 1, 90, 2], None, Fraction(1)),
        ([9, 9, 9, 9], [0.001, 0.9, 0.09, 0.009], Fraction(1)),
        ([3, 1, 4, 1, 5, 9, 2, 6], None, Fraction(3, 2)),
        ([1] * 8, [2**k for k in range(8)], Fraction(3, 2)),
    ],
)
def test_shares_hold_after_any_number_of_positions(sizes, weights, bound):
    mixture = Mixture(sizes, weights)
    exact = [Fraction(str(w)) for w in (weights or sizes)]
    counts = [0] * len(sizes)
    for position in range(2000):
        source, cursor = mixture.at(position)
        assert cursor == counts[source], "the cursor says how often the source came before"
        counts[source] += 1
        for count, weight in zip(counts, exact, strict=True):
            assert abs(count - (position + 1) * weight / sum(exact)) <= bound
    period = sum(mixture.weights)
    if period <= 2000:
        served = [mixture.at(position)[0] for position in range(period)]
        assert [served.count(s) for s in range(len(sizes))] == mixture.weights


def test_a_pass_in_proportion_to_the_sizes_shows_each_sample_once():
    sizes = [11, 5, 23]
    mixture = Mixture(sizes)
    for epoch in (0, 1):
        seen = [mixture.at(position) for position in range(epoch * 39, epoch * 39 + 39)]
        assert sorted(seen) == [(s, epoch * size + i) for s, size in enumerate(sizes) for i in range(size)]


def test_sources_are_interleaved():
    order = [Mixture([1, 1, 1, 1]).at(position)[0] for position in range(8)]
    assert sorted(order[:4]) == sorted(order[4:]) == [0, 1, 2, 3]
    halves = [Mixture([3, 1], [0.5, 0.5]).at(position)[0] for position in range(6)]
    assert halves == [0, 1, 0, 1, 0, 1]


def test_large_coprime_sizes_need_no_table():
    sizes = [558_128, 665_298, 3_318_333, 15_000_000_019]
    mixture = Mixture(sizes)
    counts = [0] * 4
    far = 10 * sum(sizes)
    assert mixture.at(far) == (mixture.at(0)[0], 10 * sizes[mixture.at(0)[0]])
    for position in range(far, far + 3000):
        counts[mixture.at(position)[0]] += 1
    assert all(abs(c - 3000 * size / sum(sizes)) <= 1 for c, size in zip(counts, sizes, strict=True))


def test_weights_are_exact_fractions():
    assert Mixture([5, 5], [0.1, 0.2]).weights == [1, 2]
    assert Mixture([5, 5], [1 / 3, 2 / 3]).weights == [1, 2]
    assert Mixture([5, 5], [3, 1]).weights == [3, 1]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e-9])
def test_impossible_weights_are_refused(weight):
    with pytest.raises(ConfigError, match="weight"):
        Mixture([5, 5], [1.0, weight])


def test_empty_sources_and_missing_weights_are_refused():
    with pytest.raises(ConfigError, match="needs samples"):
        Mixture([5, 0])
    with pytest.raises(ConfigError, match="1 weights for 2"):
        Mixture([5, 5], [1.0])


def test_sequential_reads_source_after_source():
    stream = Sequential([2, 3])
    assert [stream.at(position) for position in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    with pytest.raises(IndexError):
        stream.at(5)
