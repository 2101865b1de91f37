"""Atomic checkpoints: a folder per step, whose manifest is written last.

    checkpoints/step-200/state.pt                    tensors and plain data; torch.load(weights_only=True) reads it
    checkpoints/step-200/shard-0-of-2.safetensors    a rank's rows of sharded tensors, if there are any
    checkpoints/step-200/manifest.json               size and SHA-256 of each file

Any strategy on any number of ranks reads it. A folder is written beside its destination, every file and folder is
synced to the disk, then it is renamed.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import distributed

from mmlab.runs.disk import sync_folder, to_json
from mmlab.training.checkpoint_folder import MANIFEST, SHARD, STATE, draft_of, find_fault, remove
from mmlab.training.sharded_checkpoint import join, mapped, read_whole, sharded_tensors, tied, with_notes, write_rows


class FolderCheckpointIO(CheckpointIO):
    """Writes and reads checkpoint folders; Lightning saves on the first rank only, `ShardedStrategy` on all.

    A full or failing disk does not end the training: the fault is printed and kept in `fault`, and earlier checkpoints
    are not touched. `check` is called with each checkpoint and its path before anything is restored from it.
    """

    def __init__(self):
        self.fault: str | None = None
        self.check: Callable[[Mapping[str, Any], Path], None] = lambda checkpoint, path: None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        draft = draft_of(target)
        self.fault = None
        try:
            draft.mkdir(parents=True)
            write(checkpoint, draft)
            _replace(draft, target)
        except OSError as error:
            self._note(target, error.strerror or str(error))
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def save_sharded(self, checkpoint: Mapping[str, Any], target: Path) -> None:
        """Save on all ranks: each writes its rows of sharded tensors, and the first one everything else.

        If the disk fails for one rank, all have the fault, and nothing is renamed.
        """
        rank, tensors = distributed.get_rank(), sharded_tensors(checkpoint)
        draft, same = _from_first_rank((draft_of(target), tied(tensors)))
        self.fault = None
        files: dict[str, Any] = {}
        fault: str | None = None
        try:
            draft.mkdir(parents=True, exist_ok=True)
            rows = {name: tensor for name, tensor in tensors.items() if name not in same}
            files = _write_share(draft, with_notes(checkpoint, same) if rank == 0 else None, rows)
        except OSError as error:
            fault = f"{error.strerror or error} on rank {rank}"
        every: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(every, (files, fault))  # also the barrier before the rename
        fault = next((reason for _, reason in every if reason), None)
        if rank == 0:
            try:
                if fault is None:
                    _write_manifest(draft, {name: facts for files, _ in every for name, facts in files.items()})
                    _replace(draft, target)
            except OSError as error:
                fault = error.strerror or str(error)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        if fault := _from_first_rank(fault):
            self._note(target, fault, aloud=rank == 0)

    def _note(self, target: Path, reason: str, aloud: bool = True) -> None:
        self.fault = f"{target} could not be written ({reason}); earlier checkpoints are unchanged."
        if aloud:
            print(f"WARNING: {self.fault}", file=sys.stderr, flush=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint that is intact; objects are never unpickled, whatever `weights_only` is."""
        checkpoint = read(Path(path), map_location)
        self.check(checkpoint, Path(path))
        return checkpoint

    def load_mapped(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint without reading its tensors, see `read_mapped`."""
        checkpoint = read_mapped(path)
        self.check(checkpoint, path)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        remove(Path(path))


def write(state: Mapping[str, Any], folder: Path) -> None:
    """Write `state` (tensors and plain data) into an existing folder, manifest last, all synced to the disk.

    Raises:
        OSError: the disk is full or fails.
    """
    _write_manifest(folder, {STATE: _write_state(folder, state)})


def read(folder: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Return the state of a checkpoint with all its tensors, whatever strategy has saved it."""
    state = torch.load(folder / STATE, map_location=map_location or "cpu", weights_only=True)
    return read_whole(join(state, files)) if (files := _shards(folder)) else state


def read_mapped(folder: Path) -> dict[str, Any]:
    """Return the state of a checkpoint with tensors that are mapped from its files; sharded ones are `Stored`."""
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
    return join(mapped(state), _shards(folder))


def _write_state(folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Write `state.pt`; returns its size and hash."""
    with (folder / STATE).open("wb") as raw:
        file = _Hashed(raw)
        try:
            torch.save(dict(state), file)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch's own for a failed write
            raise file.error or error from None
        _sync(raw)
    return file.facts()


def _write_share(folder: Path, state: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Write this rank's rows of sharded tensors, and on the first rank the state; returns size and hash by file."""
    name = f"{SHARD}{distributed.get_rank()}-of-{distributed.get_world_size()}.safetensors"
    files = {} if state is None else {STATE: _write_state(folder, state)}
    if not tensors:
        return files
    with (folder / name).open("wb") as raw:
        file = _Hashed(raw)
        write_rows(tensors, file)
        _sync(raw)
    sync_folder(folder)
    return {**files, name: file.facts()}


def _write_manifest(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest, and sync the folder.

    Raises:
        OSError: a file that another rank wrote is not in this rank's folder.
    """
    for name, facts in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != facts["size"]:
            raise OSError(f"{name} is not there, though a rank wrote it: the ranks need a common file system")
    manifest = {"format": 1, "torch": str(torch.__version__), "files": files}
    with (folder / MANIFEST).open("wb") as raw:
        raw.write(to_json(manifest, indent=1).encode() + b"\n")
        _sync(raw)
    sync_folder(folder)


def _shards(folder: Path) -> list[Path]:
    """The files with sharded tensors that the manifest names."""
    names = json.loads((folder / MANIFEST).read_bytes())["files"]
    return [folder / name for name in names if name.startswith(SHARD)]


def _from_first_rank(value: Any) -> Any:
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


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
