"""Where the index of a folder of shards lies: beside the shards, or in the user's cache if that folder is read-only."""

import hashlib
import os
from pathlib import Path

INDEX_NAME = "index.npz"
VARIABLE = "MMLAB_INDEX_DIR"


def index_files(folder: Path) -> tuple[Path, Path]:
    """Return the file beside the shards, and the one elsewhere.

    The latter is `$MMLAB_INDEX_DIR/<name>-<hash of the folder's path>.npz`; without the variable, it is in
    `~/.cache/mmlab/indexes` (or below `$XDG_CACHE_HOME`).
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmlab" / "indexes"
    elsewhere = Path(os.environ.get(VARIABLE) or cache).expanduser()
    path = folder.expanduser().resolve()
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return folder / INDEX_NAME, elsewhere / f"{path.name}-{name}.npz"


def has_index(folder: Path) -> bool:
    """Whether one of the files exists; it may not fit the shards."""
    return any(path.is_file() for path in index_files(folder))
