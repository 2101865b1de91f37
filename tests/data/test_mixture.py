from collections import Counter
from fractions import Fraction
from itertools import chain

import pytest

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.config import SourceConfig
from mmlab.data.mixture import Mixture, Sequential, Source, by_type, open_sources
from mmlab.data.reader import GlobalBatches, LocalBatches
from tests.tiny_shards import KeyCollate, make_shards, settings


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


@pytest.mark.parametrize("sizes", [[3], [5, 2], [7, 4, 10], [1, 1, 9, 30, 2]])
def test_what_each_source_has_served_before_a_position(sizes):
    mixture, counts = Mixture(sizes), [0] * len(sizes)
    for position in range(120):
        assert mixture.served(position) == counts
        source, cursor = mixture.at(position)
        assert cursor == counts[source]
        counts[source] += 1


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


# 10 : 4 : 13, about as the published 58,000 : 23,000 : 77,000.
TYPES = ["talk"] * 10 + ["detail"] * 4 + ["why"] * 13


@pytest.fixture
def source(tmp_path) -> Source:
    return Source("chat", make_shards(tmp_path / "chat", 81, types=TYPES))


def batches(sources, global_batch=60, micro_batch=60, world=1, steps=50, seed=0):
    """The batches of all ranks, in the order of their positions."""
    ranks = [
        LocalBatches(sources, KeyCollate(), GlobalBatches(global_batch, micro_batch, world, rank), settings(seed=seed))
        for rank in range(world)
    ]
    parts = global_batch // (micro_batch * world)
    return [rank[m] for m in range(steps * parts) for rank in ranks]


def seen_types(batches) -> Counter:
    counts: Counter = Counter()
    for batch in batches:
        for counters in batch["stats"].values():
            counts.update({name: n for name, n in counters.items() if name.startswith("type/")})
    return counts


def keys(batches) -> list[str]:
    return list(chain(*(batch["keys"] for batch in batches)))


def test_a_third_each_over_3000_samples(source):
    made = batches(by_type([source]))
    counts = seen_types(made)
    assert counts.total() == 3000 and all(abs(n - 1000) <= 10 for n in counts.values()) and len(counts) == 3
    kinds = dict(zip(list(source.index.keys), map(source.index.type_of, range(81)), strict=True))
    assert Counter(kinds[key] for key in keys(made)) == {name[5:]: n for name, n in counts.items()}
    for kind, size in (("talk", 30), ("detail", 12), ("why", 39)):
        times = Counter(key for key in keys(made) if kinds[key] == kind)
        assert len(times) == size and max(times.values()) - min(times.values()) <= 1, "passes, each in its own order"


def test_types_are_also_counted_in_proportion(source):
    counts = seen_types(batches([source], steps=27))  # 20 passes
    assert counts == {"type/talk": 600, "type/detail": 240, "type/why": 780}


@pytest.mark.parametrize(("micro_batch", "world"), [(15, 1), (10, 2), (5, 3)])
def test_ranks_and_accumulation_change_nothing(source, micro_batch, world):
    parts = by_type([source])
    assert keys(batches(parts, micro_batch=micro_batch, world=world, steps=4)) == keys(batches(parts, steps=4))
    assert keys(batches(parts, steps=4)) != keys(batches(parts, steps=4, seed=1))


def test_any_item_can_be_made_alone(source):
    whole = LocalBatches(by_type([source]), KeyCollate(), GlobalBatches(12, 12), settings())
    assert [whole[m]["keys"] for m in (7, 3)] == [batch["keys"] for batch in batches(by_type([source]), 12, 12)[7:2:-4]]


def test_a_type_in_two_sources_has_one_share(tmp_path, source):
    other = Source("other", make_shards(tmp_path / "other", 10, types=["why"]))
    parts = by_type([source, other])
    assert [part.name for part in parts] == ["chat/detail", "chat/talk", "chat/why", "other/why"]
    made = batches(parts, steps=49)  # 2,940
    assert all(abs(n - 980) <= 1 for n in seen_types(made).values())
    served = Counter(name for batch in made for name in batch["sources"])
    assert served["other/why"] / served["chat/why"] == pytest.approx(10 / 39, rel=0.01)


def test_a_replacement_has_the_same_type(tmp_path):
    bad = {i for i in range(81) if i % 9 == 0}
    source = Source("chat", make_shards(tmp_path / "chat", 81, types=TYPES, bad=bad))
    data = LocalBatches(by_type([source]), KeyCollate(), GlobalBatches(300, 300), settings(bad_budget=1.0))
    assert seen_types([data[0]]) == {"type/talk": 100, "type/detail": 100, "type/why": 100}
    assert not {source.index.keys[i] for i in bad} & set(data[0]["keys"])


def test_samples_without_a_type_cannot_be_balanced(tmp_path, source):
    plain = Source("plain", make_shards(tmp_path / "plain", 5))
    with pytest.raises(DataError, match=r"'plain' .* without a `type`.*mmlab shards index"):
        by_type([source, plain])


def test_sources_open_by_folder(tmp_path):
    make_shards(tmp_path / "a", 3)
    make_shards(tmp_path / "b", 3)
    config = settings(root=str(tmp_path))

    def opened(*listed: SourceConfig) -> list[str]:
        return [source.name for source in open_sources(config, listed)]

    assert opened(SourceConfig("a"), SourceConfig("b", name="other")) == ["a", "other"]
    with pytest.raises(ConfigError, match="two sources are named 'a'"):
        opened(SourceConfig("a"), SourceConfig("a"))
    with pytest.raises(ConfigError, match="is one shard"):
        opened(SourceConfig("a/shard-000000.tar"))
    with pytest.raises(DataError):
        opened(SourceConfig("none"))
