"""The shard cache: which objects of remote sets lie in its folder, which one is fetched next, and which are evicted.

Nothing here uses a network or a lock; the fetcher calls it under its own.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mmlab.config.errors import DataError
from mmlab.data.remote.wanted import Wanted, objects_of

PRESENT, NEXT, AHEAD, UNWANTED = range(4)
"""Of what use an object is: of a present block, of a next block, of a later one, of none."""
Rank = tuple[int, int, int]  # use, place in the list, and of a shard 1, of its table 0; the larger, the less useful
_FOLDER = re.compile(r".*-[0-9a-f]{16}")
_FILE = re.compile(r".*-[0-9a-f]{16}(\.\w+)?(\.part)?")


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
        self._copies: dict[str, _Copy] = {}  # by path
        self._claims: dict[tuple[int, bool], list[tuple[Rank, Wanted]]] = {}  # by client and whether they are held
        self._claimed: dict[str, Counter[Rank]] = {}  # path → the ranks that clients give it
        self._ranks: dict[str, Rank] = {}  # path → the best of them
        self._wanted: dict[str, Wanted] = {}  # by path
        self._last: dict[str, int] = {}  # path → when it was last wanted; missing: before this process
        self._failed: set[str] = set()
        self._clock = itertools.count()
        folder.mkdir(parents=True, exist_ok=True)
        self._take_over()
        self._trim()

    @property
    def present(self) -> int:
        """Bytes of the present blocks of all clients."""
        return sum(self._wanted[path].size for path, rank in self._ranks.items() if rank[0] == PRESENT)

    def path(self, entry: Wanted) -> Path:
        """Where the copy of an object lies, or will lie."""
        return self.folder / entry.path

    def want(self, client: int, present: list[Wanted], next: list[Wanted], ahead: list[Wanted]) -> None:
        """Replace what a client wants, each list in the order of use.

        Raises:
            DataError: its present block alone is larger than the limit; it then wants nothing.
        """
        own = sum({each.path: each.size for entry in present for each in objects_of(entry)}.values())
        lists = enumerate([] if own > self.limit else (present, next, ahead))
        self._claim(client, False, [(use, place, entry) for use, each in lists for place, entry in enumerate(each)])
        if own > self.limit:
            raise DataError(too_small(own, self.limit))

    def hold(self, client: int, entry: Wanted | None) -> None:
        """Keep an object for a client as one of a present block, until this is called again."""
        self._claim(client, True, [(PRESENT, 0, entry)] if entry else [])

    def leave(self, client: int) -> None:
        """Forget a client and what it wants."""
        self._claim(client, False, [])
        self._claim(client, True, [])

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
        short = False
        missing = [path for path in self._ranks if path not in self._copies and path not in self._failed]
        for path in sorted(missing, key=self._ranks.__getitem__):
            use, entry = self._ranks[path][0], self._wanted[path]
            if use > least or (short and use > PRESENT):
                return None
            if isinstance(entry.table, Wanted) and self.find(entry.table) is None:
                continue  # its own entry comes first
            if self._make_room(entry.size, self._ranks[path]):
                self._put(path, entry.size, whole=False)
                return entry
            if use > PRESENT:
                return None  # what is wanted later must not take the place that it waits for
            short = True
        return None

    def is_wanted(self, path: str) -> bool:
        """Whether any client wants the object with this path."""
        return path in self._ranks

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

    def _claim(self, client: int, held: bool, claims: list[tuple[int, int, Wanted]]) -> None:
        """Replace a client's claims and compute anew how useful their objects are."""
        old = self._claims.pop((client, held), [])
        new = [((use, at, i), each) for use, at, entry in claims for i, each in enumerate(objects_of(entry))]
        if new:
            self._claims[client, held] = new
        for rank, entry in new:
            self._claimed.setdefault(entry.path, Counter())[rank] += 1
            self._wanted[entry.path] = entry
        for rank, entry in old:
            self._claimed[entry.path][rank] -= 1
        for _, entry in [*new, *reversed(old)]:  # of those dropped together, the last one goes first
            if ranks := +self._claimed.get(entry.path, Counter()):
                self._claimed[entry.path] = ranks
                self._ranks[entry.path] = min(ranks)
            elif self._claimed.pop(entry.path, None) is not None:
                del self._ranks[entry.path], self._wanted[entry.path]
                self._last[entry.path] = next(self._clock)
                self._failed.discard(entry.path)

    def _rank_of(self, path: str) -> Rank:
        """Of unwanted ones, those wanted longest ago have the largest."""
        return self._ranks.get(path) or (UNWANTED, -self._last.get(path, -1), 0)

    def _make_room(self, size: int, rank: Rank) -> bool:
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


def _files(folder: Path) -> Iterator[Path]:
    """The files of all sets in a cache folder, by the form of their names."""
    for top in folder.iterdir():
        if _FOLDER.fullmatch(top.name) and top.is_dir() and not top.is_symlink():
            for root, _, names in os.walk(top):
                yield from (Path(root, name) for name in names if _FILE.fullmatch(name))
