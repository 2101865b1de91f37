"""Atomic checkpoints: a folder per step, whose manifest is written last.

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
from mmlab.runs.disk import sync_folder, to_json

STATE = "state.pt"
MANIFEST = "manifest.json"
PREFIX = "step-"
_DRAFT = ".draft-"


class FolderCheckpointIO(CheckpointIO):
    """Writes and reads checkpoint folders; Lightning calls it on the first rank only.

    A full or failing disk does not end the training: the fault is printed and kept in `fault`, and earlier checkpoints
    are not touched. `check` is called with each checkpoint and its path before anything is restored from it.
    """

    def __init__(self):
        self.fault: str | None = None
        self.check: Callable[[Mapping[str, Any], Path], None] = lambda checkpoint, path: None

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
                f"{target} could not be written ({error.strerror or error}); earlier checkpoints are unchanged."
            )
            print(f"WARNING: {self.fault}", file=sys.stderr, flush=True)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of `newest_whole`; objects are never unpickled, whatever `weights_only` is."""
        checkpoint = read(Path(path), map_location)
        self.check(checkpoint, Path(path))
        return checkpoint

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
        except RuntimeError as error:  # torch's own for a failed write
            raise file.error or error from None
        _sync(raw)
    manifest = {"format": 1, "torch": str(torch.__version__), "files": {STATE: file.facts()}}
    with (folder / MANIFEST).open("wb") as raw:
        raw.write(to_json(manifest, indent=1).encode() + b"\n")
        _sync(raw)
    sync_folder(folder)


def read(folder: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Return the state that `write` wrote."""
    return torch.load(folder / STATE, map_location=map_location or "cpu", weights_only=True)


def find_fault(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint (a missing file, a wrong size or hash), or None if it is intact."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        expected = {name: (int(facts["size"]), str(facts["sha256"])) for name, facts in files.items()}
        if STATE not in expected or any(Path(name).name != name for name in expected):
            return f"{MANIFEST} does not name {STATE}"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, (size, sha256) in expected.items():
        try:
            with (folder / name).open("rb") as file:
                actual = os.fstat(file.fileno()).st_size
                if actual != size:
                    return f"{name} has {actual} bytes instead of {size}"
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return f"the contents of {name} have changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def steps(folder: Path) -> dict[int, Path]:
    """Return step → checkpoint of a folder of checkpoints, the newest first, damaged ones too."""
    checkpoints = {}
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(ValueError):
            checkpoints[int(path.name.removeprefix(PREFIX))] = path
    return dict(sorted(checkpoints.items(), reverse=True))


def newest_whole(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest intact checkpoint, or None if there are no checkpoints.

    Args:
        folder: of the run's checkpoints.
        warn: called with a sentence about each damaged one that is skipped.

    Raises:
        RunError: there are checkpoints, and all are damaged.
    """
    faults = []
    for path in steps(folder).values():
        fault = find_fault(path)
        if fault is None:
            return path
        faults.append(f"{path} is damaged: {fault}")
        warn(faults[-1])
    if faults:
        raise RunError(f"All checkpoints of this run are damaged: {'; '.join(faults)}. run.fresh=true starts it over.")
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, if the newest is intact on the disk."""
    checkpoints = list(steps(folder).values())
    if len(checkpoints) > keep and find_fault(checkpoints[0]) is None:
        for path in checkpoints[keep:]:
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint atomically: a kill leaves a draft, not half a checkpoint."""
    draft = path.with_name(f"{_DRAFT}{uuid.uuid4().hex[:8]}")
    with suppress(FileNotFoundError):
        path.rename(draft)
        shutil.rmtree(draft, ignore_errors=True)


def remove_drafts(folder: Path) -> None:
    """Remove the drafts of killed processes."""
    for path in folder.glob(f"{_DRAFT}*"):
        shutil.rmtree(path, ignore_errors=True)


def _replace(draft: Path, target: Path) -> None:
    """Rename; a folder cannot replace one that holds files, so an earlier save of the step is removed first."""
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
    """A file for torch.save that hashes what is written and keeps the error that torch would hide."""

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
