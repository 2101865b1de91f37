"""A checkpoint is whole or not there, whatever happens while it is written."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from mmlab.training import checkpoint_folder
from mmlab.training import checkpoint_io as io
from tests.tiny_ranks import forked
from tests.training.tiny_checkpoints import damage, save, state


def test_what_is_written_is_read_back_without_unpickling(tmp_path):
    target = save(tmp_path, 3)
    assert checkpoint_folder.find_fault(target) is None
    back = io.FolderCheckpointIO().load_checkpoint(target)
    assert torch.equal(back["weights"], state(3)["weights"])
    assert back["rng"] == (3, (1, 2), None) and back["step"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3"]


def test_objects_are_not_read(tmp_path):
    io.FolderCheckpointIO().save_checkpoint({"x": Path("a")}, tmp_path / "step-1")
    with pytest.raises(Exception, match="Weights only load failed"):
        io.read(tmp_path / "step-1")


def test_saving_a_step_again_replaces_a_damaged_one(tmp_path):
    target = save(tmp_path, 5)
    damage(target / checkpoint_folder.STATE, "truncate")
    save(tmp_path, 5)
    assert checkpoint_folder.find_fault(target) is None
    save(tmp_path, 5)
    assert checkpoint_folder.find_fault(target) is None and [path.name for path in tmp_path.iterdir()] == ["step-5"]


@pytest.mark.parametrize("file", [checkpoint_folder.STATE, checkpoint_folder.MANIFEST])
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
    assert checkpoint_folder.newest_whole(tmp_path, pytest.fail) == old
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    writer.save_checkpoint(state(2), tmp_path / "step-2")
    assert writer.fault is None and checkpoint_folder.newest_whole(tmp_path, pytest.fail) == tmp_path / "step-2"


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
    newest = checkpoint_folder.newest_whole(tmp_path, pytest.fail)
    assert newest is not None and io.read(newest)["step"] == (2 if point == "after" else 1)
    assert len(list(tmp_path.glob(".draft-*"))) == (0 if point == "after" else 1)
    checkpoint_folder.remove_drafts(tmp_path)
    assert not list(tmp_path.glob(".*"))
