"""The index of a set of shards: random access by sample number, verified by checksums."""

import zlib
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mmlab.config.errors import DataError
from mmlab.config.locations import Location, Url, is_url
from mmlab.data.config import CacheConfig
from mmlab.data.local_files import LocalFiles
from mmlab.data.manifest import Entry, Manifest
from mmlab.data.sample_types import SampleError
from mmlab.data.scan import list_shards, local_folder
from mmlab.data.scan_notes import ScanNotes
from mmlab.data.shard_table import MALFORMED, ShardTable, joined, open_table
from mmlab.runs.index_files import MANIFEST, index_folders

if TYPE_CHECKING:
    from mmlab.data.remote.remote_files import RemoteFiles

_OPEN_TABLES = 32  # each holds a descriptor, as an open shard does
OLD_INDEX = "index.npz"
"""The index of earlier versions, in one file."""
BUILD = "build it with `mmlab shards index"


class SetFiles(Protocol):
    """Where the files of a set come from: `LocalFiles`, or those of an object store."""

    def table(self, entry: Entry) -> Path:
        """The local file of a shard's table."""
        ...

    def read(self, entry: Entry, offset: int, length: int, again: bool = False) -> bytes:
        """Read bytes of a shard, fewer at its end; `again` after they were wrong."""
        ...


@dataclass(frozen=True)
class ShardIndex:
    """An open set of shards. N samples in S shards; samples of one shard are adjacent, in tar order.

    Its memory grows with S: the tables of the shards are mapped, the last used ones at a time. Only its place and hash
    are pickled, and the cache of a remote one; worker processes of any start method open it again.
    """

    root: Location
    manifest: Manifest = field(repr=False)
    files: SetFiles = field(repr=False, compare=False)
    _tables: dict[int, ShardTable] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return self._ends[-1]

    def __reduce__(self):
        return _reopen, (self.root, self.hash, None if isinstance(self.root, Path) else self.files)

    @classmethod
    def open(cls, root: str | Location, cache: CacheConfig | None = None) -> "ShardIndex":
        """Open the index of a set; that of a local folder must still fit its shards.

        Args:
            root: a folder or an address.
            cache: for the shards and tables of an address; None: the default settings.

        Raises:
            DataError: no folder, no index, one of another version, an address that cannot be read, or shards that were
                added, removed or resized.
        """
        if is_url(root):
            from mmlab.data.remote.remote_files import open_remote

            return cls(Url(str(root)), *open_remote(Url(str(root)), cache))
        folder = local_folder(root)
        faults: list[DataError] = []
        for place in index_folders(folder):
            try:
                if isinstance(place, Path) and (place / MANIFEST).is_file():
                    index = cls(folder, _manifest(place / MANIFEST, folder), LocalFiles(folder, place))
                    index.check_shards({path.name: (path.stat().st_size, None) for path in list_shards(folder)})
                    return index
            except DataError as error:
                faults.append(error)
        if not faults and (folder / OLD_INDEX).is_file():
            raise DataError(f"{folder} has an index of an earlier version; re{BUILD} {folder}`.")
        raise faults[0] if faults else DataError(f"{folder} has no index; {BUILD} {folder}`.")

    @property
    def hash(self) -> str:
        """sha256 over names, keys, offsets, sizes and checksums of all shards."""
        return self.manifest.hash

    @property
    def notes(self) -> ScanNotes:
        """What was found beside samples that can be used."""
        return self.manifest.notes

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """The file names, sorted."""
        return tuple(entry.name for entry in self.manifest.entries)

    @cached_property
    def shard_sizes(self) -> np.ndarray:
        """int64 `[S]`: bytes of each file."""
        return np.array([entry.bytes for entry in self.manifest.entries], np.int64)

    @property
    def samples_per_shard(self) -> np.ndarray:
        """int64 `[S]`."""
        return self.manifest.samples

    @property
    def type_names(self) -> tuple[str, ...]:
        """Response types that occur; just an empty text for samples without one."""
        return self.manifest.type_names

    @cached_property
    def keys(self) -> Sequence[str]:
        """The keys of all samples, read when they are asked for."""
        return _Keys(self)

    def read(self, i: int, only: Collection[str] | None = None) -> dict[str, bytes]:
        """Read the members of sample `i`.

        Args:
            i: number of the sample, 0 <= i < N.
            only: extensions to read; None reads all.

        Returns:
            Lower-case extension → bytes.

        Raises:
            IndexError: there is no sample `i`.
            SampleError: `checksum` for bytes that changed since the index was built.
            DataError: the shard cannot be opened or read.
        """
        shard, j = self.place(i)
        entry, sample = self.manifest.entries[shard], {}
        for extension, offset, length, crc in self.table(shard).members(j):
            if only is not None and extension not in only:
                continue
            data = self.files.read(entry, offset, length)
            if len(data) != length or zlib.crc32(data) != crc:
                data = self.files.read(entry, offset, length, again=True)
            if len(data) != length or zlib.crc32(data) != crc:
                where = f"{self.root / entry.name}: {self.keys[i]}.{extension}"
                raise SampleError("checksum", f"{where} has changed since the index was built.")
            sample[extension] = data
        return sample

    def place(self, i: int) -> tuple[int, int]:
        """The shard that holds sample `i`, and the sample's number in it; raises IndexError if there is none."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = bisect_right(self._ends, i)
        return shard, i - self.first(shard)

    def first(self, shard: int) -> int:
        """The number of a shard's first sample."""
        return self._ends[shard - 1] if shard else 0

    def table(self, shard: int) -> ShardTable:
        """The table of a shard.

        Raises:
            DataError: it is missing, damaged, or of another shard.
        """
        table = self._tables.get(shard)
        if table is None:
            entry = self.manifest.entries[shard]
            path = self.files.table(entry)
            table = open_table(path, self.root)
            if (table.about.hash, len(table)) != (entry.hash, entry.samples):
                raise DataError(f"the index of {self.root} was rebuilt with other contents while it was in use.")
            self._tables[shard] = table
            while len(self._tables) > _OPEN_TABLES:
                self._tables.pop(next(iter(self._tables)), None)
        return table

    def keep_tables(self, shards: Collection[int]) -> None:
        """Close the tables of all other shards."""
        for shard in self._tables.keys() - shards:
            self._tables.pop(shard, None)

    def tables(self, shards: Iterable[int] | None = None) -> Iterator[ShardTable]:
        """The tables of some shards, or of all."""
        return map(self.table, range(len(self.shards)) if shards is None else shards)

    def joined(self, name: str, shards: Iterable[int] | None = None) -> np.ndarray:
        """An array of `ShardTable`, such as `text_lengths`, over some shards or all of them."""
        return joined(self.tables(shards), name)

    def find(self, key: str, shards: Iterable[int] | None = None) -> int | None:
        """The number of the sample with this key, or None; the tables of all shards, or of some, are searched."""
        for shard in range(len(self.shards)) if shards is None else shards:
            if (j := self.table(shard).find(key)) is not None:
                return self.first(shard) + j
        return None

    def type_of(self, i: int) -> str:
        """The response type of sample `i`, or an empty string."""
        if self.type_names == ("",):
            return ""
        shard, j = self.place(i)
        return self.table(shard).type_of(j)

    def of_type(self, shard: int, kind: str) -> np.ndarray:
        """int64: the numbers, within a shard, of its samples of a response type."""
        table = self.table(shard)
        if self.type_names == ("",):
            return np.arange(len(table) if kind == "" else 0)
        names = table.about.type_names
        return np.flatnonzero(table.type_codes == names.index(kind)) if kind in names else np.zeros(0, np.int64)

    def extensions(self, i: int) -> list[str]:
        """The member extensions of sample `i`, without reading it."""
        shard, j = self.place(i)
        return [extension for extension, *_ in self.table(shard).members(j)]

    @cached_property
    def _ends(self) -> list[int]:
        return np.cumsum(self.samples_per_shard).tolist()  # in a list of Python's, the search takes a fifth of the time

    def check_shards(self, there: Mapping[str, tuple[int, str | None]]) -> None:
        """Compare the shards that are there with those that were indexed.

        Args:
            there: name of each → its size and, in a store, its ETag.

        Raises:
            DataError: one was added, removed or replaced.
        """
        for name in sorted(there.keys() ^ set(self.shards)):
            state = "was added" if name in there else "was removed"
            raise DataError(f"shard {name} of {self.root} {state} since the index was built; re{BUILD} {self.root}`.")
        for entry in self.manifest.entries:
            size, etag = there[entry.name]
            if size != entry.bytes:
                state = f"has {size} bytes, but had {entry.bytes} when the index was built"
            elif None not in (etag, entry.etag) and etag != entry.etag:
                state = "was replaced since the index was built (another ETag)"
            else:
                continue
            raise DataError(f"shard {self.root / entry.name} {state}; re{BUILD} {self.root}`.")


class _Keys(Sequence[str]):
    """The keys of all samples of an index."""

    def __init__(self, index: ShardIndex):
        self._shards = index

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, i: int) -> str:  # type: ignore[override]
        shard, j = self._shards.place(i)
        return self._shards.table(shard).key(j)

    def __iter__(self) -> Iterator[str]:
        for table in self._shards.tables():
            yield from table.keys()


def _manifest(path: Path, folder: Path) -> Manifest:
    try:
        return Manifest.of(path.read_bytes())
    except (OSError, *MALFORMED) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read ({reason}); re{BUILD} {folder}`.") from None


def _reopen(root: Location, content_hash: str, files: "RemoteFiles | None" = None) -> ShardIndex:
    if files is not None:
        return ShardIndex(root, files.manifest(content_hash), files)
    index = ShardIndex.open(root)
    if index.hash != content_hash:
        raise DataError(f"the index of {root} was rebuilt with different contents while it was in use.")
    return index
