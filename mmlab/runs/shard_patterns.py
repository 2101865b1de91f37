"""The shards that a path names when there is no index: one tar, a folder of them, or webdataset's brace patterns."""

import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from mmlab.config.errors import ConfigError, nearest
from mmlab.config.locations import Location, Url, is_url, location, split_address
from mmlab.runs.index_files import has_index

MOST = 1_000_000
"""The most shards that a pattern may name."""
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")


def named_shards(path: str, root: str = "") -> list[Location]:
    """The shards that a path names, in order.

    Args:
        path: a folder of tars, a tar, a pattern such as `part-{000..009}.tar`, or several of these joined by `::`.
        root: a folder or an address that relative paths start from.

    Raises:
        ConfigError: a command, a pattern that cannot be expanded, a shard that is named twice, or a folder or shard
            that is not there.
    """
    shards = [shard for pattern in path.split("::") for shard in _expanded(pattern, root)]
    if len(set(map(str, shards))) < len(shards):
        raise ConfigError(f"'{path}' names a shard twice.")
    return shards


def lacks_index(path: str, root: str = "") -> bool:
    """Whether a path names local shards without an index."""
    if "::" in path:
        return True
    place = location(path, root)
    return isinstance(place, Path) and not has_index(place)


def set_name(shards: Sequence[Location]) -> str:
    """The name of a source with these shards: the folder of the first one."""
    folder = shards[0].parent
    return (folder.resolve() if isinstance(folder, Path) else folder).name


def _expanded(pattern: str, root: str) -> list[Location]:
    whole = location(pattern, root)
    if isinstance(whole, Url):
        split_address(whole)
    elif whole.is_dir():
        return _in_folder(whole)
    try:
        too_long = any(_steps(*each) >= MOST for each in _RANGE.findall(pattern))  # it would be expanded at once
        names = [] if too_long else list(islice(braceexpand(str(whole)), MOST + 1))
    except ValueError:
        raise ConfigError(f"'{pattern}' has braces that do not match.") from None
    if too_long or len(names) > MOST:
        raise ConfigError(f"'{pattern}' names more than {MOST:,} shards.")
    shards: list[Location] = [Url(name) if is_url(name) else Path(name) for name in names]
    for shard in shards:
        _check(shard, pattern, len(shards))
    return shards


def _steps(first: str, last: str, step: str) -> int:
    return abs(int(last) - int(first)) // (abs(int(step or 1)) or 1)


def _in_folder(folder: Path) -> list[Location]:
    shards = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not shards:
        raise ConfigError(f"there are no .tar files in {folder}.")
    return list(shards)


def _check(shard: Location, pattern: str, number: int) -> None:
    """Check that a shard is a tar, and that a local one exists."""
    if shard.suffix == ".tar" and (isinstance(shard, Url) or shard.is_file()):
        return
    if isinstance(shard, Url):
        raise ConfigError(f"{shard} is not the address of a .tar; name the shards, as in {shard}/{{000..009}}.tar.")
    if any(letter in pattern for letter in "*?["):
        raise ConfigError(f"'{pattern}' has a wildcard; give a folder for all its tars, or braces as in {{000..009}}.")
    if shard.is_file():
        raise ConfigError(f"{shard} is not a plain .tar; decompress it first.")
    siblings = [each.name for each in shard.parent.iterdir()] if shard.parent.is_dir() else []
    of = f", one of {number:,} that '{pattern}' names" if number > 1 else ""
    what = "shard" if shard.suffix == ".tar" else "folder"
    raise ConfigError(f"there is no {what} {shard}{of}.{nearest(shard.name, siblings)}")
