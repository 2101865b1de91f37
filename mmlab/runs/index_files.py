"""Where the index of a set of shards lies: beside the shards, or elsewhere if they are read-only."""

import hashlib
import os
from pathlib import Path

from mmlab.config.locations import Location, Url, user_cache

INDEX_NAME = "index"
"""The subfolder with the index of a set of shards."""
MANIFEST = "manifest.json"
VARIABLE = "MMLAB_INDEX_DIR"


def index_folders(root: Location) -> tuple[Location, Path]:
    """Return the folder beside the shards, and the one elsewhere.

    The latter is `$MMLAB_INDEX_DIR/<name>-<hash of the set's path or address>`; without the variable, it is in the
    user's cache.
    """
    elsewhere = Path(os.environ.get(VARIABLE) or user_cache("indexes")).expanduser()
    return root / INDEX_NAME, elsewhere / _named(root.expanduser().resolve() if isinstance(root, Path) else root)


def upload_draft(url: Url) -> Path:
    """The folder of what is uploaded to an address later, in the user's cache."""
    return user_cache("builds") / _named(url)


def _named(place: Location) -> str:
    return f"{place.name}-{hashlib.sha256(os.fsencode(str(place))).hexdigest()[:16]}"


def has_index(folder: Path) -> bool:
    """Whether a local set has an index; it may not fit the shards."""
    return any(isinstance(place, Path) and (place / MANIFEST).is_file() for place in index_folders(folder))
