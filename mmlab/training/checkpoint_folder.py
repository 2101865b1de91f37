"""The checkpoints of a run's folder: which there are, which are intact, and their removal."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from mmlab.config.errors import RunError

STATE = "state.pt"
MANIFEST = "manifest.json"
PREFIX = "step-"
SHARD = "shard-"
_DRAFT = ".draft-"


def find_fault(folder: Path, hashes: bool = True) -> str | None:
    """Return what is wrong with a checkpoint (a missing file, a wrong size or hash), or None if it is intact.

    Args:
        folder: of the checkpoint.
        hashes: whether files are read and hashed.
    """
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        expected = {name: (int(facts["size"]), str(facts["sha256"])) for name, facts in files.items()}
        if STATE not in expected or any(Path(name).name != name for name in expected):
            return f"{MANIFEST} does not name {STATE}"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        facts = [(folder / name, size, sha256 if hashes else None) for name, (size, sha256) in expected.items()]
        faults = list(pool.map(lambda file: _fault_of(*file), facts))
    return next((fault for fault in faults if fault), None)


def _fault_of(path: Path, size: int, sha256: str | None) -> str | None:
    """What is wrong with a file of a checkpoint, or None."""
    try:
        with path.open("rb") as file:
            actual = os.fstat(file.fileno()).st_size
            if actual != size:
                return f"{path.name} has {actual} bytes instead of {size}"
            if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                return f"the contents of {path.name} have changed"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None


def steps(folder: Path) -> dict[int, Path]:
    """Return step → checkpoint of a folder of checkpoints, the newest first, damaged ones too."""
    checkpoints = {}
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(ValueError):
            checkpoints[int(path.name.removeprefix(PREFIX))] = path
    return dict(sorted(checkpoints.items(), reverse=True))


def newest_whole(folder: Path, warn: Callable[[str], None], hashes: bool = True) -> Path | None:
    """Return the newest intact checkpoint, or None if there are no checkpoints.

    Args:
        folder: of the run's checkpoints.
        warn: called with a sentence about each damaged one that is skipped.
        hashes: whether files are read and hashed.

    Raises:
        RunError: there are checkpoints, and all are damaged.
    """
    faults = []
    for path in steps(folder).values():
        fault = find_fault(path, hashes)
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
    if len(checkpoints) <= keep:
        return
    # All ranks would wait while a sharded one is read again: of its files, only the sizes are compared.
    sharded = any(checkpoints[0].glob(f"{SHARD}*"))
    if find_fault(checkpoints[0], hashes=not sharded) is None:
        for path in checkpoints[keep:]:
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint atomically: a kill leaves a draft, not half a checkpoint."""
    draft = draft_of(path)
    with suppress(FileNotFoundError):
        path.rename(draft)
        shutil.rmtree(draft, ignore_errors=True)


def remove_drafts(folder: Path) -> None:
    """Remove the drafts of killed processes."""
    for path in folder.glob(f"{_DRAFT}*"):
        shutil.rmtree(path, ignore_errors=True)


def draft_of(target: Path) -> Path:
    """Where a checkpoint is written before it is renamed to `target`, or removed from."""
    return target.with_name(f"{_DRAFT}{uuid.uuid4().hex[:8]}")
