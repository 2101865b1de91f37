import json
import os
import signal
import subprocess
import sys

import pytest
from webdataset.compat import WebDataset

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import SampleError
from mmlab.data.shard_files import Samples, ShardWriter, write_shards
from mmlab.data.tally import Tally
from tests.tiny_sets import tiny_set


def test_webdataset_reads_our_shards(tmp_path):
    index = tiny_set(tmp_path / "set")
    paths = [str(index.root / name) for name in index.shards]
    read = list(WebDataset(paths, shardshuffle=False))
    assert [item["__key__"] for item in read] == list(index.keys)
    for i, item in enumerate(read):
        assert {name: item[name] for name in ("png", "json", "txt")} == index.read(i)


def test_names_counts_and_bytes_repeat(tmp_path):
    first, second = tiny_set(tmp_path / "a"), tiny_set(tmp_path / "b")
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
    tiny_set(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"not empty.*--overwrite"):
        tiny_set(tmp_path / "set")
    assert len(tiny_set(tmp_path / "set", count=1, overwrite=True)) == 1
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["index", "shard-000000.tar"]
    (tmp_path / "set" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        tiny_set(tmp_path / "set", overwrite=True)
    assert (tmp_path / "set" / "thesis.tex").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_error_while_overwriting_keeps_the_old_set(tmp_path):
    before = tiny_set(tmp_path / "set").hash
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
    assert len(tiny_set(tmp_path / "set")) == 5


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


def test_shards_are_indexed_and_summarized_without_torch():
    modules = "mmlab.keyed, mmlab.data.config, mmlab.data.mixture, mmlab.data.shard_files, mmlab.data.sources.shapes, "
    modules += "mmlab.data.shard_stats, mmlab.data.verification"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
