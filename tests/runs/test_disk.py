"""Files are replaced atomically, and a disk that refuses gives one sentence, whichever library wrote."""

import ast
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from mmlab import cli
from mmlab.config.disk_errors import refusal
from mmlab.config.errors import RunError
from mmlab.runs import disk
from mmlab.runs.disk import DRAFT, replacing, write_json, write_text, writing

FULL = OSError(errno.ENOSPC, "No space left on device")


def drafts(folder):
    return [path.name for path in folder.rglob(f"{DRAFT}*")]


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "new/a.json"
    write_json(file, {"a": "猫"})
    write_json(file, [1], indent=2)
    assert json.loads(file.read_text()) == [1] and not drafts(tmp_path)


def test_a_folder_is_replaced_whole(tmp_path):
    for number in range(2):
        with replacing(tmp_path / "part") as draft:
            (draft / "inner").mkdir(parents=True)
            (draft / f"inner/{number}").touch()
    assert [path.name for path in (tmp_path / "part").rglob("*")] == ["inner", "1"] and not drafts(tmp_path)


def test_a_folder_that_cannot_be_exchanged_stays(tmp_path, monkeypatch):
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "a").write_text("old")
    rename = Path.rename

    def fails(self, target):
        if (self / "a").read_text() == "new":
            raise FULL
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(RunError, match="the disk is full"), replacing(folder) as draft:
        draft.mkdir()
        (draft / "a").write_text("new")
    assert (folder / "a").read_text() == "old" and not drafts(tmp_path)


def test_an_interrupted_write_leaves_the_earlier_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    sentence = "a.txt cannot be written: the disk is full; everything saved earlier"
    with pytest.raises(RunError, match=sentence), replacing(tmp_path / "a.txt") as draft:
        draft.write_text("ne")
        raise FULL
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.txt") as draft:
        draft.write_text("ne")
        raise KeyboardInterrupt
    assert (tmp_path / "a.txt").read_text() == "old" and not drafts(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: Path(path).write_text("x" * 100000),
        lambda path: np.savez(Path(path).open("wb"), a=np.zeros(100000)),  # noqa: SIM115
        lambda path: np.zeros(100000).tofile(Path(path).open("wb")),  # noqa: SIM115
        lambda path: torch.save({"a": torch.zeros(100000)}, path),
        lambda path: Image.new("RGB", (900, 900)).save(path, "PNG"),
        lambda path: Image.effect_noise((900, 900), 90).save(path, "JPEG"),
    ],
    ids=["text", "savez", "tofile", "torch", "png", "jpeg"],
)
def test_the_errors_of_libraries_on_a_full_disk(write):
    with pytest.raises(RunError, match="/x/y cannot be written: the disk is full"), writing("/x/y"):  # type: ignore[arg-type]
        write("/dev/full")


def test_the_errors_of_safetensors(tmp_path):
    with pytest.raises(SafetensorError) as error:
        save_file({"a": torch.zeros(3)}, "/proc/nothing")
    assert refusal(SafetensorError(str(error.value).replace("os error 2", "os error 28"))) == "the disk is full"


@pytest.mark.parametrize("sync", [True, False])
def test_file_systems_that_cannot_sync_folders(tmp_path, monkeypatch, sync):
    synced, fsync = [], os.fsync

    def only_files(number):
        synced.append(number)
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(number)

    monkeypatch.setattr(os, "fsync", only_files)
    with replacing(tmp_path / "part", sync) as draft:
        draft.mkdir()
        (draft / "a").touch()
    assert (tmp_path / "part/a").is_file() and len(synced) == 3 * sync


def test_an_error_of_another_kind_is_not_hidden():
    with pytest.raises(ZeroDivisionError), writing("x"):  # type: ignore[arg-type]
        raise ZeroDivisionError
    assert refusal(ValueError("no space for a comma")) is None and refusal(FileNotFoundError(2, "none")) is None
    try:
        raise ValueError from None  # after a cache that could not be written, for example
    except ValueError as error:
        error.__context__ = FULL
        assert refusal(error) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_no_traceback_for_a_write_that_nobody_expected_to_fail(monkeypatch, capsys, number):
    def fail(argv):
        try:
            raise OSError(number, os.strerror(number), "/there/file")
        except OSError as error:
            raise RuntimeError("torch cannot save") from error

    monkeypatch.setattr(cli, "dispatch", fail)
    assert cli.main(["train"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mmlab: /there/file cannot be used: ")


def test_json_has_no_nan(tmp_path):
    content = {"val/loss": float("nan"), "rows": [(1.5, float("-inf"))], "steps": 3, "name": "NaN"}
    write_json(tmp_path / "done.json", content)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    read = json.loads((tmp_path / "done.json").read_text(), parse_constant=refuse)
    assert read == {"val/loss": None, "rows": [[1.5, None]], "steps": 3, "name": "NaN"}


def test_all_json_is_made_by_one_function():
    """`json.dumps` alone would write NaN, which other readers refuse."""
    root = Path(disk.__file__).parent.parent
    calls = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in sorted(root.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps")
        if not any(keyword.arg == "allow_nan" for keyword in node.keywords)
    ]
    assert calls == []
