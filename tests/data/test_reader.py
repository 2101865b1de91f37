import io
import shutil
from itertools import chain

import pytest
from PIL import Image

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.config import SourceConfig, StreamLoaderConfig
from mmlab.data.dialogues import caption_of
from mmlab.data.mixture import Source, by_type, open_sources
from mmlab.data.order import EpochOrder, sample_seed, source_seed
from mmlab.data.reader import GlobalBatches, LocalBatches, OnePass
from mmlab.data.sample_types import ImageSpec
from mmlab.data.shard_files import ShardWriter
from mmlab.data.stream import StreamBatches, open_streams
from mmlab.data.walked_shards import open_or_walk
from tests.tiny_shards import KeyCollate, make_shards, settings

NAMES = ("keys", "seeds", "sources", "bad")


def batches_of(sources, micro_batch, world=1, steps=6, global_batch=8, seed=0) -> list[dict]:
    """All ranks' micro batches in the order of their positions, joined into global batches."""
    joined = []
    ranks = [
        LocalBatches(sources, KeyCollate(), GlobalBatches(global_batch, micro_batch, world, r), settings(seed=seed))
        for r in range(world)
    ]
    parts = global_batch // (micro_batch * world)
    for step in range(steps):
        pieces = [rank[step * parts + part] for part in range(parts) for rank in ranks]
        joined.append({name: list(chain(*(piece[name] for piece in pieces))) for name in NAMES})
    return joined


@pytest.fixture
def sources(tmp_path):
    return [Source("a", make_shards(tmp_path / "a", 13)), Source("b", make_shards(tmp_path / "b", 6))]


@pytest.mark.parametrize(("micro_batch", "world"), [(8, 1), (4, 1), (2, 1), (4, 2), (2, 2), (2, 4), (1, 4)])
def test_global_batches_are_the_same_for_any_ranks_and_accumulation(sources, micro_batch, world):
    assert batches_of(sources, micro_batch, world) == batches_of(sources, 8)


def test_keys_seeds_and_sources_follow_from_the_position(sources):
    batch = batches_of(sources[:1], 8, seed=5)[1]
    order = EpochOrder(sources[0].index.samples_per_shard, source_seed(5, "a"), 8)
    places = [divmod(position, 13) for position in range(8, 16)]
    assert batch["keys"] == [str(sources[0].index.keys[order.sample(*place)]) for place in places]
    assert batch["seeds"] == [sample_seed(5, *place, "a") for place in places]
    assert batch["sources"] == ["a"] * 8


def test_each_pass_over_the_mixture_shows_each_sample_once(sources):
    keys = list(chain(*(batch["keys"] for batch in batches_of(sources, 8, steps=19))))
    every = sorted(str(key) for source in sources for key in source.index.keys)
    for epoch in range(8):
        assert sorted(keys[epoch * 19 : epoch * 19 + 19]) == every
    assert keys[:19] != keys[19:38]


def test_seeds_and_weights_change_the_stream(sources):
    assert batches_of(sources, 8, seed=1) != batches_of(sources, 8, seed=2)
    weighed = [Source("a", sources[0].index, 0.25), Source("b", sources[1].index, 0.75)]
    served = list(chain(*(batch["sources"] for batch in batches_of(weighed, 8))))
    assert served.count("b") == 36


def test_a_replaced_sample_does_not_shift_the_order(tmp_path):
    whole = [Source("s", make_shards(tmp_path / "whole" / "s", 20))]
    broken = [Source("s", make_shards(tmp_path / "broken" / "s", 20, bad={3, 11}))]
    expected = list(chain(*(b["keys"] for b in batches_of(whole, 4, 2))))
    batches = batches_of(broken, 4, 2)
    keys = list(chain(*(b["keys"] for b in batches)))
    differ = [i for i, (one, other) in enumerate(zip(expected, keys, strict=True)) if one != other]
    assert {expected[i] for i in differ} == {"s0003", "s0011"}
    assert not {"s0003", "s0011"} & set(keys)
    assert batches == batches_of(broken, 1, 4), "the stand-in is the same on any rank"
    seeds = [list(chain(*(b["seeds"] for b in batches_of(s, 8)))) for s in (whole, broken)]
    assert seeds[0] == seeds[1]


def test_replacements_are_counted_with_their_reason(tmp_path):
    source = Source("s", make_shards(tmp_path / "s", 8, bad={2}))
    batch = LocalBatches([source], KeyCollate(), GlobalBatches(8, 8), settings())[0]
    n = batch["stats"]["s"]["replaced"]
    assert batch["stats"] == {
        "s": {"seen": 8, "replaced": n, "replaced/no-loss": n, "tokens": 32, "tokens_with_loss": 8}
    }
    assert batch["bad"][0] == {
        "source": "s", "key": "s0002", "reason": "no-loss", "message": "nothing to learn"
    }  # fmt: skip
    assert len(batch["keys"]) == 8


def test_damaged_bytes_and_json_are_replaced(tmp_path):
    with ShardWriter(tmp_path / "s", 10, quiet=True) as writer:
        for i in range(8):
            json = {0: b"{broken", 1: b"[1]", 2: b"[" * 100_000}.get(i, b'{"caption": ""}')
            writer.write(f"k{i}", {"json": json, "txt": "  a text \n"})
    shard = tmp_path / "s" / writer.index.shards[0]
    data = bytearray(shard.read_bytes())
    at = writer.index.table(0).members(5)[0][1]
    data[at] ^= 1
    shard.write_bytes(data)
    batch = LocalBatches([Source("s", writer.index)], KeyCollate(), GlobalBatches(8, 8), settings())[0]
    assert {bad["key"]: bad["reason"] for bad in batch["bad"]} == {
        "k0": "json", "k1": "json", "k2": "json", "k5": "checksum"
    }  # fmt: skip


def test_records_and_images_reach_the_collate(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (255, 0, 0)).save(buffer, "PNG")
    with ShardWriter(tmp_path / "s", 10, quiet=True) as writer:
        writer.write("both", {"png": buffer.getvalue(), "json": {"caption": "from json"}, "txt": "from text"})
        writer.write("text", {"png": buffer.getvalue(), "txt": "from text"})
        writer.write("plain", {"json": {"conversations": []}})

    class Keep(KeyCollate):
        def batch(self, contents):
            return {"samples": contents}

    sources = [Source("s", writer.index)]
    samples = LocalBatches(sources, Keep(ImageSpec(8, "stretch")), OnePass(3, 3), settings())[0]["samples"]
    assert [s.record for s in samples] == [
        {"caption": "from json"}, {"caption": "from text"}, {"conversations": []}
    ]  # fmt: skip
    assert samples[0].image.shape == (3, 8, 8)
    assert samples[0].image[:, 4, 4].tolist() == [255, 0, 0]
    assert samples[2].image is None
    assert LocalBatches(sources, Keep(), OnePass(3, 3), settings())[0]["samples"][0].image is None


def test_a_source_without_a_usable_sample_stops_the_run(tmp_path):
    sources = [Source("s", make_shards(tmp_path / "s", 3, bad={0, 1, 2}))]
    with pytest.raises(DataError, match=r"'s' gave 3 unusable samples in a row.*no-loss.*nothing to learn"):
        LocalBatches(sources, KeyCollate(), GlobalBatches(2, 2), settings())[0]


def test_a_reader_far_over_the_budget_stops(tmp_path):
    sources = [Source("s", make_shards(tmp_path / "s", 40, bad=set(range(0, 40, 2))))]
    data = LocalBatches(sources, KeyCollate(), GlobalBatches(8, 8), settings(bad_budget=0.001))
    with pytest.raises(DataError, match=r"bad_budget=0\.001"):
        for m in range(40):
            data[m]
    patient = LocalBatches(sources, KeyCollate(), GlobalBatches(8, 8), settings(bad_budget=1.0))
    assert sum(patient[m]["stats"]["s"]["seen"] for m in range(40)) == 320


@pytest.mark.parametrize(("samples", "world"), [(10, 1), (10, 2), (11, 3), (3, 3), (24, 2), (25, 2)])
def test_one_pass_is_as_long_on_every_rank_and_shows_each_sample_once(samples, world):
    cuts = [OnePass(samples, 4, world, rank) for rank in range(world)]
    assert len({len(cut) for cut in cuts}) == 1
    sizes = [[len(cut.positions(m)) for m in range(len(cut))] for cut in cuts]
    assert all(size == sizes[0] and 0 not in size for size in sizes)
    positions = sorted(p for cut in cuts for m in range(len(cut)) for p in cut.positions(m))
    assert positions == list(range(samples - cuts[0].dropped))
    assert cuts[0].dropped < world


@pytest.mark.parametrize("world", [1, 2])
def test_one_pass_over_a_part_takes_evenly_spaced_samples(world):
    cuts = [OnePass(7, 2, world, rank, every=3) for rank in range(world)]
    positions = sorted(p for cut in cuts for m in range(len(cut)) for p in cut.positions(m))
    assert positions == [0, 3, 6, 9, 12, 15, 18][: 7 - cuts[0].dropped]


class Broken(KeyCollate):
    """Raises what a test chose, at the samples that it chose."""

    def __init__(self, keys: set[str], error: Exception):
        super().__init__()
        self.keys, self.error = keys, error

    def prepare(self, sample):
        if not self.keys or sample.key in self.keys:
            raise self.error
        return super().prepare(sample)


def test_whatever_a_record_makes_the_collate_raise_is_a_bad_sample(tmp_path):
    source = Source("s", make_shards(tmp_path / "s", 8))
    one = LocalBatches([source], Broken({"s0003"}, TypeError("no text")), GlobalBatches(8, 8), settings())[0]
    assert {(bad["key"], bad["reason"]) for bad in one["bad"]} == {("s0003", "TypeError")}
    assert "TypeError: no text (test_reader.py, line" in one["bad"][0]["message"] and "s0003" not in one["keys"]
    with pytest.raises(DataError, match=r"'s' gave 8 unusable .*\(TypeError\): TypeError: no text \(test_reader\.py"):
        LocalBatches([source], Broken(set(), TypeError("no text")), GlobalBatches(8, 8), settings())[0]
    for error in (ConfigError("ours"), MemoryError(), OSError(28, "No space left")):
        with pytest.raises(type(error)):
            LocalBatches([source], Broken({"s0003"}, error), GlobalBatches(8, 8), settings())[0]


def test_half_an_emoji_is_a_bad_sample(tmp_path):
    with ShardWriter(tmp_path / "s", 10, quiet=True) as writer:
        for i in range(8):
            writer.write(f"k{i}", {"json": rb'{"caption": "\ud83d"}' if i == 5 else b'{"caption": "a \\ud83d\\ude00"}'})
    batch = LocalBatches([Source("s", writer.index)], KeyCollate(), GlobalBatches(8, 8), settings())[0]
    assert {bad["key"]: bad["reason"] for bad in batch["bad"]} == {"k5": "unicode"}


class CaptionCollate(KeyCollate):
    def batch(self, contents):
        return {"captions": [caption_of(sample.record, sample.seed) for sample in contents]}


@pytest.mark.parametrize("way", ["indexed", "walked", "streamed"])
def test_a_source_s_caption_stands_for_those_of_its_samples(tmp_path, way):
    for name in ("own", "other"):
        with ShardWriter(tmp_path / name, 4, quiet=True) as writer:
            for i in range(4):
                writer.write(f"{name}{i}", {"json": {"captions": [f"{name} {i}", f"{name} {i}, too"]}})
    listed = [
        SourceConfig(path=str(tmp_path / "own"), weight=1, caption="a photo of sks"),
        SourceConfig(path=str(tmp_path / "other"), weight=1),
    ]
    data = settings(train=listed, loader=StreamLoaderConfig()) if way == "streamed" else settings(train=listed)
    if way == "streamed":
        batch = StreamBatches(open_streams(data), CaptionCollate(), GlobalBatches(8, 8), data)[0]
    else:
        if way == "walked":
            for index in tmp_path.glob("*/index"):
                shutil.rmtree(index)
        opened = open_or_walk(data, listed) if way == "walked" else open_sources(data, listed)
        batch = LocalBatches(opened, CaptionCollate(), OnePass(8, 8), data)[0]
    assert batch["captions"].count("a photo of sks") == 4
    assert sum(caption.startswith("other ") for caption in batch["captions"]) == 4


def test_a_source_s_caption_belongs_to_all_of_its_types(tmp_path):
    source = Source("chat", make_shards(tmp_path / "chat", 8, types=["why", "what"]), caption="here")
    assert [part.caption for part in by_type([source])] == ["here", "here"]
