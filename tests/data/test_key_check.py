import numpy as np
import pytest

from mmlab.config.errors import DataError
from mmlab.data import key_check, scan, shard_table
from mmlab.data.indexing import build_index, index_set
from tests.tiny_files import write_tar


def write(folder, *shards: str) -> None:
    for i, keys in enumerate(shards):
        write_tar(folder / f"{i:05d}.tar", *((f"{key}.txt", b"x") for key in keys))


@pytest.mark.parametrize("at_once", [3, 100])
def test_equal_keys_of_shards_that_are_far_apart_are_found(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(key_check, "AT_ONCE", at_once)
    write(tmp_path, "abc", "def", "ghi", "jkl", "mbn")
    with pytest.raises(DataError, match=r"key 'b' is in two shards of .*: 00000\.tar and 00004\.tar\.$"):
        build_index(tmp_path, quiet=True)
    assert not (tmp_path / "index" / "manifest.json").exists()
    write(tmp_path, "abc", "def", "ghi", "jkl", "mon")
    assert len(build_index(tmp_path, quiet=True)) == 15


@pytest.mark.parametrize("at_once", [3, 100])
def test_different_keys_with_equal_hashes_are_no_error(tmp_path, monkeypatch, at_once):
    for module in (scan, shard_table):
        monkeypatch.setattr(module, "key_hash", lambda key: (ord(key) % 3) << 62)
    monkeypatch.setattr(key_check, "AT_ONCE", at_once)
    monkeypatch.setattr(key_check, "_LOOKED_UP", 2)
    write(tmp_path, "abc", "def", "ghi")
    index = build_index(tmp_path, quiet=True)
    assert [index.find(key) for key in "abcdefghix"] == [*range(9), None]
    write(tmp_path, "abc", "def", "gha")
    with pytest.raises(DataError, match=r"'a' is in two shards"):
        index_set(tmp_path, quiet=True)


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_repeated_values_are_found_part_by_part(monkeypatch, at_once):
    monkeypatch.setattr(key_check, "AT_ONCE", at_once)
    random = np.random.default_rng(0)
    values = random.integers(0, 1 << 64, 200, np.uint64)
    values[[3, 50, 190]] = values[[7, 51, 2]]
    values[10], values[11], values[12], values[13] = 0, (1 << 64) - 1, 0, (1 << 64) - 1
    found = np.concatenate(list(key_check.repeated_hashes(np.split(values, [10, 10, 90]), len(values))))
    assert sorted(found.tolist()) == sorted({0, (1 << 64) - 1, *values[[3, 50, 190]].tolist()})
