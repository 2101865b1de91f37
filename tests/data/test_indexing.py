import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mmlab.config.errors import DataError, RunError
from mmlab.data import shard_places
from mmlab.data.index import OLD_INDEX, ShardIndex
from mmlab.data.indexing import build_index, index_part, index_set
from mmlab.data.progress_bar import in_processes
from mmlab.data.shard_table import open_table, write_table
from mmlab.runs.index_files import INDEX_NAME, MANIFEST, VARIABLE, index_folders
from mmlab.verbs.shards import main
from tests.tiny_files import png, write_tar


@pytest.fixture
def root(tmp_path) -> Path:
    """Five shards with two samples each."""
    folder = tmp_path / "set"
    for i in range(5):
        write_tar(folder / f"{i}.tar", *((f"k{i}{j}.{name}", png()) for j in "ab" for name in ("png", "0.png")))
    _tick(folder)
    return folder


@pytest.fixture
def scans(monkeypatch) -> list[str]:
    """Names of the shards that are read."""
    scans, scan = [], shard_places.scan_shard
    monkeypatch.setattr(shard_places, "scan_shard", lambda path, *rest: scans.append(path.name) or scan(path, *rest))
    return scans


def _tick(folder: Path) -> None:
    """Wait until the clock of the disk has gone on."""
    probe = folder / ".probe"
    start = time.time_ns()
    while not probe.exists() or probe.stat().st_mtime_ns <= start:
        probe.touch()
    probe.unlink()


def _files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / INDEX_NAME).iterdir())}


def test_only_shards_that_changed_are_read_again(root, scans):
    assert (index_set(root, quiet=True).read, scans) == (5, [f"{i}.tar" for i in range(5)])
    before = _files(root)
    scans.clear()
    assert index_set(root, quiet=True).read == 0 and _files(root) == before and not scans
    os.utime(root / "1.tar")  # written again, with equal contents
    (root / "3.tar").rename(root / "7.tar")
    write_tar(root / "4.tar", ("new.png", png()))
    _tick(root)
    done = index_set(root, quiet=True)
    assert (done.read, scans) == (3, ["1.tar", "4.tar", "7.tar"])
    assert sorted(_files(root)) == [*(f"{name}.safetensors" for name in "01247"), MANIFEST]
    assert list(ShardIndex.open(root).keys) == ["k0a", "k0b", "k1a", "k1b", "k2a", "k2b", "new", "k3a", "k3b"]
    drafts = [root / INDEX_NAME / f".draft-{name}-0.safetensors" for name in ("left", "written")]
    for draft in drafts:
        draft.touch()
    os.utime(drafts[0], (1, 1))
    assert index_set(root, ["png"], quiet=True).read == 5
    assert [draft.exists() for draft in drafts] == [False, True]
    assert index_set(root, ["png"], quiet=True).read == 0
    assert index_set(root, ["png"], quiet=True, again=True).read == 5


def test_a_shard_without_samples_is_read_once(root, scans):
    write_tar(root / "5.tar")
    _tick(root)
    assert [index_set(root, quiet=True).read for _ in range(2)] == [6, 0] and scans.count("5.tar") == 1
    assert ShardIndex.open(root).samples_per_shard.tolist() == [2, 2, 2, 2, 2, 0]


def test_a_table_with_other_numbers_than_its_manifest_states_is_made_again(root, scans):
    index_set(root, quiet=True)
    before, path = _files(root), root / INDEX_NAME / "1.safetensors"
    table = open_table(path, root)
    write_table(path, replace(table, text_lengths=table.text_lengths + 1))
    scans.clear()
    assert index_set(root, quiet=True).read == 1 and scans == ["1.tar"] and _files(root) == before


def test_a_copy_with_an_old_time_is_read(root, scans, tmp_path):
    index_set(root, quiet=True)
    write_tar(tmp_path / "other.tar", *((f"k1{j}.{name}", png()) for j in "xb" for name in ("png", "0.png")))
    os.utime(tmp_path / "other.tar", (1, 1))
    assert (tmp_path / "other.tar").stat().st_size == (root / "1.tar").stat().st_size
    os.replace(tmp_path / "other.tar", root / "1.tar")
    _tick(root)
    scans.clear()
    assert index_set(root, quiet=True).read == 1 and scans == ["1.tar"]
    assert ShardIndex.open(root).find("k1x") == 2


def test_a_shard_that_changes_while_it_is_read(root, monkeypatch):
    scan = shard_places.scan_shard
    monkeypatch.setattr(shard_places, "scan_shard", lambda path, *rest: (scan(path, *rest), os.utime(path))[0])
    with pytest.raises(DataError, match=r"0\.tar changed while it was read; index it when it is complete"):
        index_set(root, quiet=True)
    assert not (root / INDEX_NAME).exists()


def test_equal_sets_have_equal_bytes_however_they_are_indexed(root):
    index_set(root, quiet=True)
    whole = _files(root)
    _remove(root)
    index_set(root, workers=2, quiet=True)
    assert _files(root) == whole
    _remove(root)
    assert [index_part(root, (k, 3), quiet=True) for k in (2, 3, 1)] == [(2, 2), (1, 1), (2, 2)]
    assert sorted(_files(root)) == sorted(whole.keys() - {MANIFEST})
    with pytest.raises(DataError, match="has no index"):
        ShardIndex.open(root)
    assert index_set(root, quiet=True).read == 0 and _files(root) == whole
    assert index_part(root, (6, 9), quiet=True) == (0, 0)


def _remove(root: Path) -> None:
    for path in (root / INDEX_NAME).iterdir():
        path.unlink()


KILLED = """
import os, signal, sys
from mmlab.data import indexing, shard_places
scan, scans = shard_places.scan_shard, []
def killed(path, *rest):
    if len(scans) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    scans.append(path)
    return scan(path, *rest)
shard_places.scan_shard = killed
indexing.index_set(sys.argv[1], quiet=True)
"""


def test_a_killed_build_continues(root, scans):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(root)], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    times = {path.name: path.stat().st_mtime_ns for path in (root / INDEX_NAME).glob("[!.]*")}
    assert sorted(times) == [f"{i}.safetensors" for i in range(3)]
    with pytest.raises(DataError, match="has no index; build it with `mmlab shards index"):
        ShardIndex.open(root)
    assert index_set(root, quiet=True).read == 2 and scans == ["3.tar", "4.tar"]
    assert {name: (root / INDEX_NAME / name).stat().st_mtime_ns for name in times} == times


def test_two_builds_at_once_give_one_index(root):
    index_set(root, quiet=True)
    expected, errors = _files(root), []

    def build() -> None:
        try:
            for _ in range(5):
                index_set(root, quiet=True, again=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(ShardIndex.open(root)) == 10
    assert not errors and _files(root) == expected


def test_a_damaged_shard_leaves_the_old_manifest(root):
    before = build_index(root, quiet=True).hash
    whole = (root / "1.tar").read_bytes()
    (root / "1.tar").write_bytes(whole[:700])
    with pytest.raises(DataError, match=r"1\.tar, byte"):
        build_index(root, quiet=True)
    (root / "1.tar").write_bytes(whole)
    assert ShardIndex.open(root).hash == before


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_one_shard_ends_all(root, workers):
    (root / "1.tar").write_bytes(b"no tar" * 100)
    with pytest.raises(DataError, match=r"1\.tar, byte 0: this is not a tar"):
        index_set(root, workers=workers, quiet=True)


def test_an_index_of_an_earlier_version_is_named_and_replaced(root, capsys):
    (root / OLD_INDEX).write_bytes(b"PK")
    sentence = rf"has an index of an earlier version; rebuild it with `mmlab shards index {root}`"
    with pytest.raises(DataError, match=sentence):
        ShardIndex.open(root)
    assert main(["index", str(root)]) == 0
    assert f"{root} had an index of an earlier version, index.npz; it is replaced\n" in capsys.readouterr().out
    assert not (root / OLD_INDEX).exists() and len(ShardIndex.open(root)) == 10
    assert main(["index", str(root)]) == 0
    assert "earlier version" not in capsys.readouterr().out


def test_the_command_indexes_parts_and_joins_them(root, capsys):
    assert main(["index", str(root), "--part", "2/3", "--require", "jpg|png"]) == 0
    out = capsys.readouterr().out
    assert f"{root}: 2 shards are in part 2 of 3, 2 of them were read; after all parts, run" in out
    assert f"`mmlab shards index {root} --require 'jpg|png'`" in out
    assert main(["index", str(root), "--require", "jpg|png"]) == 0
    out = capsys.readouterr().out
    assert f"{root}: 10 samples in 5 shards, all intact, 2 of them unchanged; index " in out
    for part in ("0/3", "4/3", "3", "a/b", "-1/3", "1/0"):
        assert main(["index", str(root), f"--part={part}"]) == 2
        assert "such as 3/64" in capsys.readouterr().err


def test_the_index_of_a_read_only_folder_is_in_the_cache(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    expected = build_index(root, quiet=True).hash
    _remove(root)
    (root / INDEX_NAME).rmdir()
    writing = shard_places.writing

    def read_only(path):
        if path == root / INDEX_NAME:
            raise RunError("read-only")
        return writing(path)

    monkeypatch.setattr(shard_places, "writing", read_only)
    index = build_index(root, quiet=True)
    assert not (root / INDEX_NAME).exists() and f"is in {tmp_path}/cache/" in capsys.readouterr().err
    assert ShardIndex.open(root).hash == index.hash == expected
    assert index_part(root, (1, 1), quiet=True) == (5, 0)
    old = index_folders(root)[1].with_suffix(".npz")  # of an earlier version
    old.touch()
    assert index_set(root, quiet=True).replaced and not old.exists()
    (root / INDEX_NAME).mkdir()
    (root / INDEX_NAME / MANIFEST).write_bytes(b"of another time")
    assert ShardIndex.open(root).hash == index.hash
    with pytest.raises(RunError):
        build_index(root, quiet=True, elsewhere=False)


def test_a_file_with_the_name_of_the_index(root):
    (root / INDEX_NAME).touch()
    with pytest.raises(DataError, match=rf"{root}/index is a file, .*; rename the file\."):
        index_set(root, quiet=True)


def test_tables_beside_read_only_shards_are_used(root, tmp_path, monkeypatch, scans):
    expected = build_index(root, quiet=True).hash
    scans.clear()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    places = shard_places.index_folders(root)
    monkeypatch.setattr(shard_places, "writable_folder", lambda folder, other: (places[1], "read-only"))
    (root / INDEX_NAME / "3.safetensors").unlink()
    assert index_set(root, quiet=True).read == 1 and scans == ["3.tar"]
    (root / INDEX_NAME / MANIFEST).unlink()
    assert ShardIndex.open(root).hash == expected and index_set(root, quiet=True).read == 0


def _sleep(number: int) -> None:
    Path(os.environ["SLEEPERS"], str(os.getpid())).touch()
    time.sleep(100)


def _die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_one_error():
    with pytest.raises(RunError, match="one of 2 processes was killed while indexing shards, perhaps because memory"):
        list(in_processes(_die, [1, 2], "indexing shards", 2, quiet=True))


def test_processes_end_with_the_one_that_started_them(tmp_path):
    code = "from tests.data.test_indexing import _sleep, in_processes\nlist(in_processes(_sleep, [1, 2], '', 2, True))"
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "SLEEPERS": str(tmp_path)})
    end = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    children = [int(path.name) for path in tmp_path.iterdir()]
    parent.kill()
    parent.wait()
    while any(map(_lives, children)) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(children) == 2 and not any(map(_lives, children))


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
