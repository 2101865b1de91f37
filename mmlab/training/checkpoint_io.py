"""Checkpoints that are whole or not there: a folder per step, whose manifest is written last.

    checkpoints/step-200/state.pt        tensors and plain data; torch.load(weights_only=True) reads it
    checkpoints/step-200/manifest.json   its size and SHA-256

A folder is written beside its destination, every file and folder is synced to the disk, then it is renamed.
"""

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from mmlab.config.errors import RunError
from mmlab.runs.disk import sync_folder

STATE = "state.pt"
MANIFEST = "manifest.json"
PREFIX = "step-"
_DRAFT = ".draft-"


class FolderCheckpointIO(CheckpointIO):
    """Writes and reads checkpoint folders; Lightning calls it on the first rank only.

    A disk that is full or fails does not end the training: the fault is printed, `fault` holds it, and the
    checkpoints before it stay as they were.
    """

    def __init__(self):
        self.fault: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        draft = target.with_name(f"{_DRAFT}{uuid.uuid4().hex[:8]}")
        self.fault = None
        try:
            draft.mkdir(parents=True)
            write(checkpoint, draft)
            _replace(draft, target)
        except OSError as error:
            self.fault = (
                f"{target} could not be written ({error.strerror or error}); earlier checkpoints are as they were."
            )
            print(f"WARNING: {self.fault}", file=sys.stderr, flush=True)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint that `newest_whole` found; never by unpickling objects, whatever `weights_only` says."""
        return read(Path(path), map_location)

    def remove_checkpoint(self, path: Any) -> None:
        remove(Path(path))


def write(state: Mapping[str, Any], folder: Path) -> None:
    """Write `state` (tensors and plain data) into an existing folder, manifest last, all synced to the disk.

    Raises:
        OSError: the disk is full or fails.
    """
    with (folder / STATE).open("wb") as raw:
        file = _Hashed(raw)
        try:
            torch.save(dict(state), file)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch's own, where a write failed
            raise file.error or error from None
        _sync(raw)
    manifest = {"format": 1, "torch": str(torch.__version__), "files": {STATE: file.facts()}}
    with (folder / MANIFEST).open("wb") as raw:
        raw.write(json.dumps(manifest, indent=1).encode() + b"\n")
        _sync(raw)
    sync_folder(folder)


def read(folder: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The state that `write` wrote."""
    return torch.load(folder / STATE, map_location=map_location or "cpu", weights_only=True)


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a missing file, a wrong size or a wrong hash; None where it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        known = {name: (int(facts["size"]), str(facts["sha256"])) for name, facts in files.items()}
        if STATE not in known or any(Path(name).name != name for name in known):
            return f"{MANIFEST} does not name {STATE}"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, (size, sha256) in known.items():
        try:
            with (folder / name).open("rb") as file:
                there = os.fstat(file.fileno()).st_size
                if there != size:
                    return f"{name} has {there} bytes in place of {size}"
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return f"the contents of {name} are not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def steps(folder: Path) -> dict[int, Path]:
    """Step → checkpoint of a folder of checkpoints, the newest first, damaged ones too."""
    found = {}
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(ValueError):
            found[int(path.name.removeprefix(PREFIX))] = path
    return dict(sorted(found.items(), reverse=True))


def newest_whole(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, or None where there never was one.

    Args:
        folder: of the run's checkpoints.
        warn: told of every damaged one that is passed over.

    Raises:
        RunError: there are checkpoints, and none is whole.
    """
    faults = []
    for path in steps(folder).values():
        fault = find_fault(path)
        if fault is None:
            return path
        faults.append(f"{path} is damaged: {fault}")
        warn(faults[-1])
    if faults:
        raise RunError(f"No checkpoint of this run is whole: {'; '.join(faults)}. run.fresh=true starts it over.")
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, once the newest is found to be whole on the disk."""
    found = list(steps(folder).values())
    if len(found) > keep and find_fault(found[0]) is None:
        for path in found[keep:]:
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint in one step: what is left of it after a kill is a draft."""
    gone = path.with_name(f"{_DRAFT}{uuid.uuid4().hex[:8]}")
    with suppress(FileNotFoundError):
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def remove_drafts(folder: Path) -> None:
    """Remove what killed processes have left half done."""
    for path in folder.glob(f"{_DRAFT}*"):
        shutil.rmtree(path, ignore_errors=True)


def _replace(draft: Path, target: Path) -> None:
    """Rename; a folder cannot replace one that holds files, so an earlier save of the step goes first."""
    if target.exists():
        if find_fault(target) is None and _same(draft, target):
            return
        remove(target)
    draft.rename(target)
    sync_folder(target.parent)


def _same(draft: Path, target: Path) -> bool:
    return (draft / MANIFEST).read_bytes() == (target / MANIFEST).read_bytes()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Hashed:
    """A file for torch.save that hashes what passes and keeps the fault that torch would hide."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        size = memoryview(data).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        self.file.flush()

    def facts(self) -> dict[str, Any]:
        return {"size": self.size, "sha256": self.digest.hexdigest()}
