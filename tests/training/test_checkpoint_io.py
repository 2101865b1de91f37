"""A checkpoint is whole or not there, and a damaged one is found out."""

import errno
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from mmlab.config.errors import RunError
from mmlab.training import checkpoint_io as io
from tests.tiny_ranks import forked

FILES = (io.STATE, io.MANIFEST)


def state(number: int = 0) -> dict:
    return {"weights": torch.arange(1000.0) + number, "rng": (3, (1, 2), None), "step": number}


def save(folder: Path, number: int) -> Path:
    target = folder / f"step-{number}"
    io.FolderCheckpointIO().save_checkpoint(state(number), target)
    return target


def test_what_is_written_is_read_back_without_unpickling(tmp_path):
    target = save(tmp_path, 3)
    assert io.find_fault(target) is None
    back = io.FolderCheckpointIO().load_checkpoint(target)
    assert torch.equal(back["weights"], state(3)["weights"])
    assert back["rng"] == (3, (1, 2), None) and back["step"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3"]


def test_objects_are_not_read(tmp_path):
    io.FolderCheckpointIO().save_checkpoint({"x": Path("a")}, tmp_path / "step-1")
    with pytest.raises(Exception, match="Weights only load failed"):
        io.read(tmp_path / "step-1")


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif how == "zero":
        file.write_bytes(bytes(len(data)))
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()


@pytest.mark.parametrize("how", ["flip", "truncate", "zero", "empty", "delete"])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_found_and_the_one_before_is_taken(tmp_path, file, how):
    old, new = save(tmp_path, 2), save(tmp_path, 10)
    assert io.newest_whole(tmp_path, pytest.fail) == new
    damage(new / file, how)
    said: list[str] = []
    assert io.newest_whole(tmp_path, said.append) == old
    assert len(said) == 1 and str(new) in said[0] and file in said[0]


def test_sizes_are_compared_without_reading_the_files(tmp_path):
    target = save(tmp_path, 1)
    damage(target / io.STATE, "flip")
    assert io.find_fault(target, hashes=False) is None and io.find_fault(target) is not None
    damage(target / io.STATE, "truncate")
    assert io.find_fault(target, hashes=False) is not None


def test_each_byte_of_the_manifest_counts(tmp_path):
    target = save(tmp_path, 1)
    whole = (target / io.MANIFEST).read_bytes()
    facts = whole[whole.index(b'"files"') :]
    for at in range(len(whole) - len(facts), len(whole)):
        if chr(whole[at]).isspace():
            continue
        (target / io.MANIFEST).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert io.find_fault(target) is not None, whole[:at]


def test_without_a_whole_one_the_run_does_not_start_over_silently(tmp_path):
    assert io.newest_whole(tmp_path / "none", pytest.fail) is None
    for number in (1, 2):
        damage(save(tmp_path, number) / io.STATE, "delete")
    with pytest.raises(RunError, match=r"step-2 is damaged: state.pt is missing.*step-1 .*run\.fresh=true"):
        io.newest_whole(tmp_path, lambda said: None)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    whole = save(tmp_path, 1)
    (tmp_path / "step-2").mkdir()
    assert io.newest_whole(tmp_path, lambda said: None) == whole
    (tmp_path / "step-x").mkdir()
    assert list(io.steps(tmp_path)) == [2, 1]


def test_a_manifest_that_names_another_folders_file_is_refused(tmp_path):
    target = save(tmp_path, 1)
    text = (target / io.MANIFEST).read_text()
    (target / io.MANIFEST).write_text(text.replace('"state.pt"', '"../step-1/state.pt"'))
    assert io.find_fault(target) is not None


def test_pruning_keeps_the_newest_and_waits_for_a_whole_one(tmp_path):
    for number in (1, 2, 3, 20):
        save(tmp_path, number)
    damage(tmp_path / "step-20" / io.STATE, "flip")
    io.prune(tmp_path, 2)
    assert list(io.steps(tmp_path)) == [20, 3, 2, 1]
    save(tmp_path, 20)
    io.prune(tmp_path, 2)
    assert list(io.steps(tmp_path)) == [20, 3]
    assert not list(tmp_path.glob(".*"))


def test_pruning_does_not_read_a_sharded_checkpoint(tmp_path):
    for number in (1, 2, 3):
        save(tmp_path, number)
    newest = tmp_path / "step-3"
    shard = newest / f"{io.SHARD}0-of-1.safetensors"
    shard.write_bytes(b"rows")
    manifest = json.loads((newest / io.MANIFEST).read_text())
    manifest["files"][shard.name] = {"size": 5, "sha256": "not compared"}
    (newest / io.MANIFEST).write_text(json.dumps(manifest))
    io.prune(tmp_path, 2)
    assert list(io.steps(tmp_path)) == [3, 2, 1]  # a byte is missing
    shard.write_bytes(b"rows.")
    io.prune(tmp_path, 2)
    assert list(io.steps(tmp_path)) == [3, 2]


def test_saving_a_step_again_replaces_a_damaged_one(tmp_path):
    target = save(tmp_path, 5)
    damage(target / io.STATE, "truncate")
    save(tmp_path, 5)
    assert io.find_fault(target) is None
    save(tmp_path, 5)
    assert io.find_fault(target) is None and [path.name for path in tmp_path.iterdir()] == ["step-5"]


@pytest.mark.parametrize("file", [io.STATE, io.MANIFEST])
def test_a_full_disk_leaves_the_one_before_and_says_so(tmp_path, monkeypatch, capsys, file):
    old = save(tmp_path, 1)
    opened = Path.open

    class Full:
        def __init__(self, raw):
            self.raw = raw

        def __getattr__(self, name):
            return getattr(self.raw, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.raw.close()

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(path, mode="r", *args, **kwargs):
        raw = opened(path, mode, *args, **kwargs)
        return Full(raw) if mode == "wb" and path.name == file else raw

    monkeypatch.setattr(Path, "open", full)
    writer = io.FolderCheckpointIO()
    writer.save_checkpoint(state(2), tmp_path / "step-2")
    assert "step-2 could not be written (No space left on device)" in capsys.readouterr().err
    assert writer.fault is not None
    monkeypatch.undo()
    assert io.newest_whole(tmp_path, pytest.fail) == old
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    writer.save_checkpoint(state(2), tmp_path / "step-2")
    assert writer.fault is None and io.newest_whole(tmp_path, pytest.fail) == tmp_path / "step-2"


def test_a_real_limit_on_file_size_is_such_a_fault(tmp_path, capfd):
    def fill() -> None:
        writer = io.FolderCheckpointIO()
        writer.save_checkpoint({"x": torch.zeros(10)}, tmp_path / "step-1")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        writer.save_checkpoint({"x": torch.zeros(100_000)}, tmp_path / "step-2")
        assert "step-2 could not be written (File too large)" in str(writer.fault)

    assert forked(fill) == 0, capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


POINTS = ["mkdir", "torch.save", "fsync", "manifest", "rename", "after"]


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_inside_a_save_leaves_a_whole_checkpoint(tmp_path, point, capfd):
    """SIGKILL at chosen points of a save: the checkpoint before it is found, and what is left is cleared."""

    def die(*args, **kwargs) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(state, file) -> None:
        file.write(b"half")
        file.flush()
        die()

    def save_twice() -> None:
        io.FolderCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "step-1")
        if point == "mkdir":
            io.write = die
        elif point == "torch.save":
            torch.save = half
        elif point == "fsync":
            os.fsync = die
        elif point == "manifest":
            io.json.dumps = die
        elif point == "rename":
            io._replace = die
        io.FolderCheckpointIO().save_checkpoint({"step": 2}, tmp_path / "step-2")
        if point == "after":
            die()

    assert forked(save_twice) == -signal.SIGKILL, capfd.readouterr().err
    newest = io.newest_whole(tmp_path, pytest.fail)
    assert newest is not None and io.read(newest)["step"] == (2 if point == "after" else 1)
    assert len(list(tmp_path.glob(".draft-*"))) == (0 if point == "after" else 1)
    io.remove_drafts(tmp_path)
    assert not list(tmp_path.glob(".*"))
