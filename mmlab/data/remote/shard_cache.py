"""The shard cache: which objects of remote sets lie in its folder, which one is fetched next, and which are evicted.

Nothing here uses a network or a lock; the fetcher calls it under its own.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from mmlab.config.errors import DataError

PRESENT, NEXT, AHEAD, UNWANTED = range(4)
"""Of what use an object is: of a present block, of a next block, of a later one, of none."""
_FOLDER = re.compile(r".*-[0-9a-f]{16}")
_FILE = re.compile(r".*-[0-9a-f]{16}(\.\w+)?(\.part)?")


@dataclass(frozen=True)
class Wanted:
    """An object of a set, and what its copy is compared with.

    Args:
        set: address of the set.
        name: of the object, below the address.
        size: its bytes.
        etag: of the object that was indexed; None: not compared.
        sha256: of its bytes; empty: not compared.
        hash: of its contents, for shards; an object with other contents is another file of the cache.
        table: of a shard: its index, with the checksums of its members; a text is the path of a local file.

    Raises:
        DataError: a name that leads out of the set.
    """

    set: str
    name: str
    size: int
    etag: str | None = None
    sha256: str = ""
    hash: str = ""
    table: "Wanted | str | None" = None

    def __post_init__(self) -> None:
        if self.name.startswith("/") or {"", ".", ".."} & set(self.name.split("/")) or "\0" in self.name:
            raise DataError(f"'{self.name}' cannot be the name of an object of {self.set}.")

    @cached_property
    def path(self) -> str:
        """Of its copy, relative to the cache folder; it differs for objects with other contents."""
        name = PurePosixPath(self.name)
        identity = self.hash or self.sha256 or self.etag or ""
        label = re.sub(r"[^\w.-]", "_", re.split("[?#]", self.set.rstrip("/"))[0].rpartition("/")[2], flags=re.ASCII)
        folder = f"{label[:60]}-{_short(self.set.rstrip('/'))}"
        stem = f"{name.stem[:60]}-{_short(f'{self.name}:{self.size}:{identity}')}"
        return str(PurePosixPath(folder, name.parent, stem + re.sub(r"[^\w.]", "", name.suffix)))

    def as_json(self) -> dict[str, Any]:
        """For `from_json` of another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Wanted":
        """The inverse of `as_json`; raises TypeError, KeyError or DataError for anything else."""
        table = entry["table"]
        return cls(**{**entry, "table": cls.from_json(table) if isinstance(table, Mapping) else table})


@dataclass
class _Copy:
    """A file of the cache, or the place that is reserved for one."""

    size: int
    whole: bool
    cancelled: bool = False


class ShardCache:
    """The objects in a cache folder, and the wishes of all clients; its bytes never exceed the limit.

    What is in the folder already is taken over: a file takes its name only after it was checked and written to the
    disk, so its size tells whether it is whole. Files that other programs put there are neither counted nor touched.

    Args:
        folder: of the cache; created if missing.
        limit: bytes of all files, including reserved ones.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder = folder
        self.limit = limit
        self.used = 0  # bytes of all files, and of the places that are reserved
        self.evictions = 0
        self.short = False  # whether an object of a present block finds no place
        self._copies: dict[str, _Copy] = {}  # by path
        self._wants: dict[int, list[tuple[int, Wanted]]] = {}  # of each client: (use, object), in order
        self._held: dict[int, list[tuple[int, Wanted]]] = {}  # beside them, until the client's next request
        self._ranks: dict[str, tuple[int, int]] = {}  # path → best (use, place in its list) of all clients
        self._entries: dict[str, Wanted] = {}  # the wanted ones, by path
        self._last: dict[str, int] = {}  # path → when it was last wanted; missing: before this process
        self._failed: set[str] = set()
        self._clock = itertools.count()
        folder.mkdir(parents=True, exist_ok=True)
        self._take_over()
        self._trim()

    @property
    def present(self) -> int:
        """Bytes of the present blocks of all clients."""
        return sum(self._entries[path].size for path, (use, _) in self._ranks.items() if use == PRESENT)

    def path(self, entry: Wanted) -> Path:
        """Where the copy of an object lies, or will lie."""
        return self.folder / entry.path

    def want(self, client: int, present: list[Wanted], next: list[Wanted], ahead: list[Wanted]) -> None:
        """Replace what a client wants, each list in the order of use.

        Raises:
            DataError: its present block alone is larger than the limit; it then wants nothing.
        """
        lists = ((PRESENT, present), (NEXT, next), (AHEAD, ahead))
        self._wants[client] = [(use, each) for use, entries in lists for entry in entries for each in objects_of(entry)]
        own = sum({entry.path: entry.size for use, entry in self._wants[client] if use == PRESENT}.values())
        if own > self.limit:
            self._wants[client] = []
        self._rank()
        if own > self.limit:
            raise DataError(too_small(own, self.limit))

    def hold(self, client: int, entry: Wanted | None) -> None:
        """Keep an object for a client as one of a present block, until this is called again."""
        self._held[client] = [(PRESENT, each) for each in objects_of(entry)] if entry else []
        self._rank()

    def leave(self, client: int) -> None:
        """Forget a client and what it wants."""
        self._wants.pop(client, None)
        self._held.pop(client, None)
        self._rank()

    def set_limit(self, limit: int) -> None:
        """Change the limit and evict what no longer fits, but no present block."""
        self.limit = limit
        self._trim()

    def find(self, entry: Wanted) -> Path | None:
        """Return the path of an object's whole copy; None if there is none, or if somebody removed or changed it."""
        copy = self._copies.get(entry.path)
        if copy is None or not copy.whole:
            return None
        path = self.path(entry)
        with suppress(OSError):
            if path.stat().st_size == entry.size:
                return path
        self.drop(entry)
        return None

    def drop(self, entry: Wanted) -> None:
        """Delete the copy of an object, which is then fetched again if it is wanted."""
        copy = self._copies.get(entry.path)
        if copy is not None and copy.whole:
            self._delete(entry.path)

    def next_fetch(self, least: int = AHEAD) -> Wanted | None:
        """Reserve the place of the object to fetch next, and evict what has to go for it.

        Present blocks of all clients come first, then next ones, then later ones.

        Args:
            least: the least use that an object must have.

        Returns:
            None if all is there or under way, or as long as there is no place.
        """
        self.short = False
        missing = [path for path in self._ranks if path not in self._copies and path not in self._failed]
        for path in sorted(missing, key=self._ranks.__getitem__):
            use, entry = self._ranks[path][0], self._entries[path]
            if use > least or (self.short and use > PRESENT):
                return None
            if isinstance(entry.table, Wanted) and self.find(entry.table) is None:
                continue  # its own entry comes first
            if self._make_room(entry.size, self._ranks[path]):
                self._put(path, entry.size, whole=False)
                return entry
            if use > PRESENT:
                return None  # what is wanted later must not take the place that it waits for
            self.short = True
        return None

    def is_fetching(self, entry: Wanted) -> bool:
        """Whether its place is reserved and not filled yet."""
        copy = self._copies.get(entry.path)
        return copy is not None and not copy.whole

    def is_cancelled(self, entry: Wanted) -> bool:
        """Whether the download of an object should stop: nobody wants it, or a present block needs its place."""
        copy = self._copies.get(entry.path)
        return copy is None or copy.cancelled or entry.path not in self._ranks

    def fetched(self, entry: Wanted) -> None:
        """The file has its name: it was checked and is whole."""
        self._put(entry.path, entry.size, whole=True)

    def not_fetched(self, entry: Wanted, failed: bool) -> None:
        """Give the reserved place back; a failed object is fetched again only after `retry`."""
        self._take(entry.path)
        if failed:
            self._failed.add(entry.path)

    def retry(self, entry: Wanted) -> None:
        """Forget that the download of an object, or of its table, failed."""
        self._failed.difference_update(each.path for each in objects_of(entry))

    def _rank(self) -> None:
        """Compute anew what is wanted, from the wishes of all clients."""
        ranks: dict[str, tuple[int, int]] = {}
        entries: dict[str, Wanted] = {}
        for client in self._wants.keys() | self._held.keys():
            for place, (use, entry) in enumerate(self._held.get(client, []) + self._wants.get(client, [])):
                entries[entry.path] = entry
                ranks[entry.path] = min(ranks.get(entry.path, (use, place)), (use, place))
        for path in sorted(self._ranks.keys() - ranks.keys(), key=self._ranks.__getitem__, reverse=True):
            self._last[path] = next(self._clock)
            self._failed.discard(path)
        self._ranks, self._entries = ranks, entries

    def _rank_of(self, path: str) -> tuple[int, int]:
        """(use, place), the larger the less useful; of unwanted ones, those wanted longest ago have the largest."""
        return self._ranks.get(path) or (UNWANTED, -self._last.get(path, -1))

    def _make_room(self, size: int, rank: tuple[int, int]) -> bool:
        """Evict less useful files until `size` bytes are free; evict nothing if that is impossible.

        If it takes the places of less useful downloads, too, a present block stops these, and gets its place later.
        """
        free, files, downloads = self.limit - self.used, [], []
        if free >= size:
            return True
        worse = sorted(
            (path for path in self._copies if self._rank_of(path) > rank and self._rank_of(path)[0] > PRESENT),
            key=self._rank_of,
            reverse=True,
        )
        for path in worse:
            if free >= size:
                break
            (files if self._copies[path].whole else downloads).append(path)
            free += self._copies[path].size
        if free < size:
            return False
        if downloads and rank[0] == PRESENT:
            for path in downloads:
                self._copies[path].cancelled = True
        if downloads:
            return False
        for path in files:
            self._delete(path)
            self.evictions += 1
        return self.limit - self.used >= size

    def _trim(self) -> None:
        """Evict until the limit holds, but no present block."""
        worst = sorted(self._copies, key=self._rank_of, reverse=True)
        for path in worst:
            if self.used <= self.limit or self._rank_of(path)[0] == PRESENT:
                return
            if self._copies[path].whole:
                self._delete(path)
                self.evictions += 1
            else:
                self._copies[path].cancelled = True

    def _delete(self, path: str) -> None:
        """Delete a whole file; one that the disk does not delete still counts."""
        try:
            os.unlink(self.folder / path)
        except FileNotFoundError:
            pass
        except OSError:
            return
        self._take(path)

    def _take_over(self) -> None:
        """Count what an earlier process left, in the order in which it was written; delete what it did not finish."""
        files: list[tuple[float, str, int]] = []
        for path in _files(self.folder):
            with suppress(OSError):
                if path.name.endswith(".part"):
                    path.unlink()
                else:
                    stat = path.stat()
                    files.append((stat.st_mtime, path.relative_to(self.folder).as_posix(), stat.st_size))
        for _, path, size in sorted(files):
            self._put(path, size, whole=True)
            self._last[path] = next(self._clock)

    def _put(self, path: str, size: int, whole: bool) -> None:
        self._take(path)
        self._copies[path] = _Copy(size, whole)
        self.used += size

    def _take(self, path: str) -> None:
        copy = self._copies.pop(path, None)
        self.used -= copy.size if copy else 0


def too_small(needed: int, limit: int) -> str:
    """The sentence about present blocks that do not fit into the cache."""
    return (
        f"the shards of the blocks that are read at the same time take {needed / 1e9:,.3g} GB, but the shard cache "
        f"holds {limit / 1e9:,.3g} GB; raise data.cache.gigabytes, or lower data.block_shards."
    )


def objects_of(entry: Wanted) -> list[Wanted]:
    """The objects to fetch for an entry, in order: its table, if that is remote, and itself."""
    return [entry.table, entry] if isinstance(entry.table, Wanted) else [entry]


def _files(folder: Path) -> Iterator[Path]:
    """The files of all sets in a cache folder, by the form of their names."""
    for top in folder.iterdir():
        if _FOLDER.fullmatch(top.name) and top.is_dir() and not top.is_symlink():
            for root, _, names in os.walk(top):
                yield from (Path(root, name) for name in names if _FILE.fullmatch(name))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
