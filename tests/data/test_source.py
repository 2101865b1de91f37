"""Sources by response type: shares, and an order that is still a function of the position."""

from collections import Counter
from itertools import chain

import pytest

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.mixture import Source, by_type
from mmlab.data.reader import GlobalBatches, LocalBatches
from tests.tiny_shards import KeyCollate, make_shards

# 10 : 4 : 13, about as the published 58,000 : 23,000 : 77,000.
TYPES = ["talk"] * 10 + ["detail"] * 4 + ["why"] * 13


@pytest.fixture
def source(tmp_path) -> Source:
    return Source("chat", make_shards(tmp_path / "chat", 81, types=TYPES))


def batches(sources, global_batch=60, micro_batch=60, world=1, steps=50, seed=0):
    """The batches of all ranks, in the order of their positions."""
    ranks = [
        LocalBatches(sources, KeyCollate(), GlobalBatches(global_batch, micro_batch, world, rank), seed=seed)
        for rank in range(world)
    ]
    parts = global_batch // (micro_batch * world)
    return [rank[m] for m in range(steps * parts) for rank in ranks]


def seen_types(found) -> Counter:
    counts: Counter = Counter()
    for batch in found:
        for counters in batch["stats"].values():
            counts.update({name: n for name, n in counters.items() if name.startswith("type/")})
    return counts


def keys(found) -> list[str]:
    return list(chain(*(batch["keys"] for batch in found)))


def test_a_third_each_over_3000_samples(source):
    found = batches(by_type([source]))
    counts = seen_types(found)
    assert counts.total() == 3000 and all(abs(n - 1000) <= 10 for n in counts.values()) and len(counts) == 3
    kinds = dict(zip(source.index.keys.tolist(), map(source.index.type_of, range(81)), strict=True))
    assert Counter(kinds[key] for key in keys(found)) == {name[5:]: n for name, n in counts.items()}
    for kind, size in (("talk", 30), ("detail", 12), ("why", 39)):
        times = Counter(key for key in keys(found) if kinds[key] == kind)
        assert len(times) == size and max(times.values()) - min(times.values()) <= 1, "passes, each in its own order"


def test_in_proportion_the_types_are_counted_too(source):
    counts = seen_types(batches([source], steps=27))  # 20 passes
    assert counts == {"type/talk": 600, "type/detail": 240, "type/why": 780}


@pytest.mark.parametrize(("micro_batch", "world"), [(15, 1), (10, 2), (5, 3)])
def test_ranks_and_accumulation_change_nothing(source, micro_batch, world):
    parts = by_type([source])
    assert keys(batches(parts, micro_batch=micro_batch, world=world, steps=4)) == keys(batches(parts, steps=4))
    assert keys(batches(parts, steps=4)) != keys(batches(parts, steps=4, seed=1))


def test_any_item_can_be_made_by_itself(source):
    whole = LocalBatches(by_type([source]), KeyCollate(), GlobalBatches(12, 12))
    assert [whole[m]["keys"] for m in (7, 3)] == [batch["keys"] for batch in batches(by_type([source]), 12, 12)[7:2:-4]]


def test_a_type_in_two_sources_has_one_share(tmp_path, source):
    other = Source("other", make_shards(tmp_path / "other", 10, types=["why"]))
    parts = by_type([source, other])
    assert [part.name for part in parts] == ["chat/detail", "chat/talk", "chat/why", "other/why"]
    found = batches(parts, steps=49)  # 2,940
    assert all(abs(n - 980) <= 1 for n in seen_types(found).values())
    served = Counter(name for batch in found for name in batch["sources"])
    assert served["other/why"] / served["chat/why"] == pytest.approx(10 / 39, rel=0.01)


def test_a_stand_in_is_of_the_same_type(tmp_path):
    bad = {i for i in range(81) if i % 9 == 0}
    source = Source("chat", make_shards(tmp_path / "chat", 81, types=TYPES, bad=bad))
    data = LocalBatches(by_type([source]), KeyCollate(), GlobalBatches(300, 300), bad_budget=1.0)
    assert seen_types([data[0]]) == {"type/talk": 100, "type/detail": 100, "type/why": 100}
    assert not {source.index.keys[i] for i in bad} & set(data[0]["keys"])


def test_what_cannot_be_balanced_is_one_sentence(tmp_path, source):
    with pytest.raises(ConfigError, match=r"'chat' has a weight of its own; leave the weights out"):
        by_type([Source("chat", source.index, 2.0)])
    plain = Source("plain", make_shards(tmp_path / "plain", 5))
    with pytest.raises(DataError, match=r"'plain' .* without a `type`.*mmlab shards index"):
        by_type([source, plain])
