import io
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.config import ShardsConfig, SourceConfig, StreamLoaderConfig
from mmlab.data.reader import GlobalBatches
from mmlab.data.sample_types import ImageSpec
from mmlab.data.stream import PLACES, StreamBatches, open_streams
from tests.tiny_shards import KeyCollate, make_shards, plain_tar, settings, sources

SHOWN = ("keys", "seeds", "sources", "bad", PLACES)


def config(train: Sequence[SourceConfig], workers: int = 0, block_shards: int = 2, **loader: Any) -> ShardsConfig:
    loaded = StreamLoaderConfig(**{"shuffle": 3, **loader})
    return settings(train=train, workers=workers, block_shards=block_shards, loader=loaded)


def stream(data: ShardsConfig, world: int = 1, rank: int = 0, micro_batch: int = 4, **collate: Any) -> StreamBatches:
    data.check_mixture()
    cut = GlobalBatches(micro_batch * world, micro_batch, world, rank)
    return StreamBatches(open_streams(data), KeyCollate(**collate), cut, data)


def keys_of(batches: StreamBatches, count: int) -> list[str]:
    return list(chain(*(batches[m]["keys"] for m in range(count))))


@pytest.fixture
def train(tmp_path) -> list[SourceConfig]:
    """40 samples in 10 shards."""
    make_shards(tmp_path / "a", 40)
    return sources(tmp_path / "a")


@pytest.mark.parametrize("loader", [{}, {"shuffle": 0}, {"shuffle": 1000, "shardshuffle": False}])
@pytest.mark.parametrize("block_shards", [1, 2, 8])
def test_a_pass_shows_each_sample_once_over_all_ranks_and_workers(train, loader, block_shards):
    data = config(train, 5, block_shards, **loader)  # a shard for each worker
    ranks = [stream(data, world=2, rank=rank) for rank in range(2)]
    for turn in range(2):
        keys = [key for m in range(5 * turn, 5 * turn + 5) for rank in ranks for key in rank[m]["keys"]]
        assert sorted(keys) == [f"a{i:04d}" for i in range(40)]


def test_without_shuffling_the_order_is_that_of_the_tars(train):
    straight = keys_of(stream(config(train, shuffle=0, shardshuffle=False)), 20)
    assert straight == [f"a{i:04d}" for i in range(40)] * 2
    assert keys_of(stream(config(train, shuffle=0)), 10) != straight[:40]
    shuffled = keys_of(stream(config(train, shardshuffle=False)), 10)
    assert shuffled != straight[:40] and sorted(shuffled[:8]) == straight[:8], "samples stay in their block"
    passes = keys_of(stream(config(train)), 20)
    assert passes[:40] != passes[40:] and sorted(passes[:40]) == sorted(passes[40:])


@pytest.mark.parametrize("loader", [{}, {"resampled": True}, {"shuffle": 0}])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_after_a_resume_are_those_of_a_straight_run(tmp_path, train, workers, loader):
    make_shards(tmp_path / "b", 12, per_shard=2, bad={2, 7})
    train = [SourceConfig(train[0].path, weight=3.0), SourceConfig(str(tmp_path / "b"), weight=1.0)]
    data = config(train, workers, **loader)
    straight = stream(data, world=2, rank=1)
    batches = [{name: batch[name] for name in SHOWN} for batch in map(straight.__getitem__, range(24))]
    lanes = max(1, workers)
    for first in (1, 2, 7, 16):
        before = [[b[PLACES][1] for b in batches[:first] if b[PLACES][0] % lanes == lane] for lane in range(lanes)]
        resumed = stream(data, world=2, rank=1)
        resumed.start(first, [places[-1] if places else {} for places in before])
        assert [{name: batch[name] for name in SHOWN} for batch in map(resumed.__getitem__, range(first, 24))] == (
            batches[first:]
        )


def test_sources_have_exact_shares_and_seeds_of_their_positions(tmp_path, train):
    make_shards(tmp_path / "b", 12)
    weighted = [SourceConfig(train[0].path, weight=3.0), SourceConfig(str(tmp_path / "b"), weight=1.0)]
    seen: list[dict[str, list]] = []
    for workers, world in ((0, 1), (2, 1), (1, 2)):
        ranks = [stream(config(weighted, workers), world, rank, micro_batch=8 // world) for rank in range(world)]
        parts = [rank[m] for m in range(6) for rank in ranks]
        seen.append({name: list(chain(*(part[name] for part in parts))) for name in ("seeds", "sources", "keys")})
    assert seen[0]["sources"].count("a") == 36 and len(set(seen[0]["seeds"])) == 48
    assert all(one["seeds"] == seen[0]["seeds"] and one["sources"] == seen[0]["sources"] for one in seen)
    assert seen[0]["keys"] != seen[1]["keys"], "the order depends on the workers"


def test_resampled_shards_need_not_be_as_many_as_workers(tmp_path):
    make_shards(tmp_path / "a", 8)
    train = sources(tmp_path / "a")
    with pytest.raises(
        ConfigError, match=r"'a' has 2 shards, fewer than the 6 workers of all ranks; lower data\.workers"
    ):
        stream(config(train, 3), world=2)[0]
    ranks = [keys_of(stream(config(train, 3, resampled=True), world=2, rank=rank), 30) for rank in range(2)]
    assert ranks[0] != ranks[1] and set(ranks[0]) == set(ranks[1]) == {f"a{i:04d}" for i in range(8)}


def test_seeds_change_the_order(train):
    data = config(train)
    data.seed = 1
    assert keys_of(stream(data), 4) != keys_of(stream(config(train)), 4)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_unusable_samples_are_replaced_by_the_next_ones_and_counted(tmp_path):
    good = (("png", picture()), ("json", b'{"type": "talk"}'))
    kinds: dict[str, Sequence[tuple[str, bytes]]] = {
        "a": good,
        "broken": (("png", picture()[:40]), good[1]),
        "record": (good[0], ("json", b"{")),
        "twice": (good[0], ("PNG", picture())),
        "c": good,
        "d": good,
        "e": good,
    }
    members = [(f"{key}.{kind}", data) for key, each in kinds.items() for kind, data in each]
    plain_tar(tmp_path / "s" / "00.tar", *members, ("a.json", b"{}"))
    data = config(sources(tmp_path / "s"), shuffle=0)
    batch = stream(data, image=ImageSpec(8))[0]
    assert batch["keys"] == ["a", "c", "d", "e"]
    assert [(bad["key"], bad["reason"]) for bad in batch["bad"]] == [
        ("00.tar/broken", "decode"), ("00.tar/record", "json"), ("00.tar/twice", "member"),
    ]  # fmt: skip
    counts = batch["stats"]["s"]
    assert (counts["seen"], counts["replaced"], counts["replaced/json"], counts["type/talk"]) == (4, 3, 1, 4)
    again = stream(data, image=ImageSpec(8))
    batches = [again[m] for m in range(2)]
    assert [bad["reason"] for bad in batches[1]["bad"]] == ["key", "decode", "json", "member"]


def test_nothing_but_unusable_samples_is_an_error(tmp_path):
    make_shards(tmp_path / "a", 40, bad=range(40))
    with pytest.raises(DataError, match=r"'a' gave 10 unusable samples in a row; the last is shard-.*no-loss"):
        stream(config(sources(tmp_path / "a")))[0]
    plain_tar(tmp_path / "b" / "0.tar", ("22.05.jpg", b""))
    with pytest.raises(DataError, match=r"'b': its shards hold no samples, only \.05\.jpg \(1\); a member is named"):
        stream(config(sources(tmp_path / "b")))[0]


def test_a_truncated_shard_is_an_error_that_names_it(train):
    shard = sorted(Path(train[0].path).glob("*.tar"))[7]
    shard.write_bytes(shard.read_bytes()[:2048])
    batches = stream(config(train, shuffle=0, shardshuffle=False))
    assert keys_of(batches, 7) == [f"a{i:04d}" for i in range(28)]
    with pytest.raises(DataError, match=rf"{shard.name}, byte \d+: .*truncated"):
        batches[7]


def test_equal_keys_in_several_shards_are_different_samples(tmp_path):
    for n in range(2):
        plain_tar(tmp_path / "s" / f"{n}.tar", ("a.json", b"{}"), ("b.json", b"{}"))

    class Keep(KeyCollate):
        def batch(self, contents):
            return {"places": [], "ids": [(sample.key, sample.shards) for sample in contents]}

    data = config(sources(tmp_path / "s"))
    batches = StreamBatches(open_streams(data), Keep(), GlobalBatches(4, 4), data)
    assert len(set(batches[0]["ids"])) == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train": [SourceConfig("a"), SourceConfig("b")]}, "give each source a weight"),
        ({"balance": "type"}, r"data\.balance=type needs an index"),
    ],
)
def test_what_needs_an_index_is_refused(change, says):
    data = settings(**{"train": [SourceConfig("a")], "loader": StreamLoaderConfig(), **change})
    with pytest.raises(ConfigError, match=says):
        data.check_mixture()


@pytest.mark.parametrize(("path", "remote"), [("b::s3://bucket/{0..9}.tar", True), ("b::c/{0..9}.tar", False)])
def test_one_address_among_several_patterns_makes_a_source_remote(path, remote):
    assert config([SourceConfig(path=path)]).remote is remote


def test_two_sources_of_one_name_are_refused(tmp_path, train):
    data = settings(train=[*train, SourceConfig(f"{train[0].path}/shard-00000{{0..1}}.tar")])
    with pytest.raises(ConfigError, match="two sources are named 'a'"):
        open_streams(data)
