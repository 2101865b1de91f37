import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from webdataset.compat import WebDataset

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.formats import Members
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec, SampleError
from mmlab.data.shard_files import Samples, ShardWriter, stats, verify, write_shards
from mmlab.data.tally import Tally
from tests.tiny_files import bomb, png, write_tar


def build(root, count=5, **options):
    with ShardWriter(root, max_samples=2, quiet=True, **options) as writer:
        for i in range(count):
            record = {"id": f"s{i}", "caption": "é" * i}
            writer.write(f"s{i}", {"png": png(4 + i), "json": record, "txt": "hi"})
    return writer.index


def test_webdataset_reads_our_shards(tmp_path):
    index = build(tmp_path / "set")
    paths = [str(index.root / name) for name in index.shards]
    read = list(WebDataset(paths, shardshuffle=False))
    assert [item["__key__"] for item in read] == list(index.keys)
    for i, item in enumerate(read):
        assert {name: item[name] for name in ("png", "json", "txt")} == index.read(i)


def test_names_counts_and_bytes_repeat(tmp_path):
    first, second = build(tmp_path / "a"), build(tmp_path / "b")
    assert first.shards == ("shard-000000.tar", "shard-000001.tar", "shard-000002.tar")
    assert first.samples_per_shard.tolist() == [2, 2, 1]
    for name in first.shards:
        assert (first.root / name).read_bytes() == (second.root / name).read_bytes()
    assert first.hash == second.hash
    assert json.loads(first.read(3)["json"]) == {"id": "s3", "caption": "ééé"}


def test_long_keys_survive(tmp_path):
    key = "d" * 120 + "/" + "k" * 140
    with ShardWriter(tmp_path / "set", quiet=True) as writer:
        writer.write(key, {"txt": "x"})
    assert list(writer.index.keys) == [key]


@pytest.mark.parametrize(
    ("key", "members", "message"),
    [
        ("s0", {"txt": "x"}, "twice"),
        ("../s", {"txt": "x"}, "points outside"),
        ("a.b", {"txt": "x"}, "without a dot"),
        ("x", {"pkl": b"x"}, "a shard holds jpg"),
        ("x", {}, "is empty"),
    ],
)
def test_bad_samples_are_refused_and_leave_nothing(tmp_path, key, members, message):
    with pytest.raises(DataError, match=message), ShardWriter(tmp_path / "set", quiet=True) as writer:
        writer.write("s0", {"txt": "x"})
        writer.write(key, members)
    assert list(tmp_path.iterdir()) == []


def test_no_samples_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no sample"), ShardWriter(tmp_path / "set"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_used_folder_needs_overwrite_and_must_be_shards(tmp_path):
    build(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"not empty.*--overwrite"):
        build(tmp_path / "set")
    assert len(build(tmp_path / "set", count=1, overwrite=True)) == 1
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["index", "shard-000000.tar"]
    (tmp_path / "set" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        build(tmp_path / "set", overwrite=True)
    assert (tmp_path / "set" / "thesis.tex").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_error_while_overwriting_keeps_the_old_set(tmp_path):
    before = build(tmp_path / "set").hash
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "set", overwrite=True, quiet=True) as writer:
        writer.write("x", {"txt": "x"})
        raise RuntimeError
    assert ShardIndex.open(tmp_path / "set").hash == before


def test_a_killed_build_leaves_no_set(tmp_path):
    script = (
        "import os, signal\n"
        "from mmlab.data.shard_files import ShardWriter\n"
        f"with ShardWriter({str(tmp_path / 'set')!r}, max_samples=1) as writer:\n"
        "    for i in range(3): writer.write(f's{i}', {'txt': 'x'})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "set").exists()
    assert len(build(tmp_path / "set")) == 5


def test_write_shards_returns_the_converters_counts(tmp_path):
    def converter(texts: list[str]) -> Samples:
        tally = Tally("letters")
        for text in texts:
            with tally.row(f"row {text}"):
                if not text.islower():
                    raise SampleError("upper", "It is upper case.")
                tally.details["letters"] += 1
                yield text, {"txt": text}
        return tally

    index, tally = write_shards(converter(["a", "B", "c"]), tmp_path / "set", quiet=True)
    assert len(index) == 2 and tally.counts() == {"rows": 3, "samples": 2, "upper": 1, "letters": 2}
    assert tally.lines() == ["upper 1, such as row B: It is upper case."]
    with pytest.raises(DataError, match="none of 2 rows can be used: upper 2, such as row A: It is upper case"):
        write_shards(converter(["A", "B"]), tmp_path / "none", quiet=True)
    assert not (tmp_path / "none").exists()


def test_verify_finds_a_flipped_byte_and_names_the_sample(tmp_path):
    index = build(tmp_path / "set")
    assert verify(index.root, quiet=True).hash == index.hash
    path = index.root / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[index.table(1).members(1)[0][1]] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-000001\.tar .*'s3'.*checksum"):
        verify(index.root, quiet=True)


def test_verify_finds_a_damaged_header(tmp_path):
    index = build(tmp_path / "set")
    path = index.root / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-000001\.tar"):
        verify(index.root, quiet=True)


def test_stats(tmp_path):
    index = build(tmp_path / "set")
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


def test_shards_are_indexed_and_summarized_without_torch():
    modules = "mmlab.keyed, mmlab.data.config, mmlab.data.mixture, mmlab.data.shard_files, mmlab.data.sources.shapes"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
