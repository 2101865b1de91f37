import json

import numpy as np
import pytest

from mmlab.data import shard_stats
from mmlab.data.anyres import tiles_and_places
from mmlab.data.formats import Members
from mmlab.data.sample_types import ImageSpec
from mmlab.data.shard_files import ShardWriter
from mmlab.data.shard_stats import stats
from tests.tiny_files import bomb, png, write_tar
from tests.tiny_sets import tiny_set


def test_stats(tmp_path):
    index = tiny_set(tmp_path / "set")
    summary = stats(index)
    assert summary["samples"] == 5 and summary["shards"] == 3 and summary["pictures"] == 5
    assert summary["members"] == {"png": 5, "json": 5, "txt": 5}
    assert summary["width"] == {"min": 4, "median": 6.0, "max": 8}
    assert summary["text_characters"]["max"] == 4
    assert summary["bytes"] == sum((index.root / name).stat().st_size for name in index.shards)
    json.dumps(summary)


def test_stats_counts_the_tiles_and_tokens_of_a_recipe(tmp_path):
    members: list[Members] = [{"png": png(*size), "json": {}} for size in ((8, 8), (16, 8), (16, 8), (8, 30))]
    with ShardWriter(tmp_path / "set", quiet=True) as writer:
        for n, one in enumerate(members):
            writer.write(f"s{n}", {**one, "0.png": png(40, 10)} if n == 3 else one)
    summary = stats(writer.index, ImageSpec(8, "anyres", 4, ((1, 2), (2, 1), (1, 4))))
    assert summary["tiles"] == {"min": 3, "median": 3.0, "95 %": 4.6, "max": 5}
    assert summary["image_tokens"]["max"] == 4 + 2 * (8 + 1)
    assert stats(writer.index, ImageSpec(8, "pad", 4))["image_tokens"] == {
        "min": 4,
        "median": 4.0,
        "95 %": 4.0,
        "max": 4,
    }
    assert "tiles" not in stats(writer.index)


def test_stats_counts_unusable_images(tmp_path):
    from mmlab.data.indexing import build_index

    write_tar(tmp_path / "0.tar", ("a.jpg", bomb()), ("b.jpg", b"junk"), ("c.txt", b"x"), ("d.png", png()))
    summary = stats(build_index(tmp_path, quiet=True))
    assert (summary["pictures"], summary["pictures_unreadable"], summary["pictures_beyond_cap"]) == (3, 1, 1)
    assert summary["samples_without_text"] == 3
    assert np.isfinite(summary["width"]["median"])


def test_stats_are_gathered_shard_by_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_stats, "_PARTS", 3)
    index = tiny_set(tmp_path / "set", 24)
    summary = stats(index, ImageSpec(8, "anyres", 4, ((1, 2), (2, 1), (1, 4))))
    width, height = index.joined("image_sizes").T
    assert (len({*width}), {*height}) == (24, {6})
    for name, values in {"width": width, "height": height, "text_characters": index.joined("text_lengths")}.items():
        expected = {"min": values.min(), "median": np.median(values), "max": values.max()}
        assert summary[name] == expected
    tokens = [tiles_and_places(int(one), 6, ImageSpec(8, "anyres", 4, ((1, 2), (2, 1), (1, 4))))[1] for one in width]
    assert summary["image_tokens"]["95 %"] == pytest.approx(np.percentile(tokens, 95))
    some = stats(index, shards=[0, 11])
    assert some["width"] == {"min": 4, "median": 15.5, "max": 27} and some["shards_read"] == 2
    assert some["members"] == summary["members"] and some["samples_without_text"] == 0
