"""Building the index of a set of shards: shard by shard, so that a killed build continues and only changes are read."""

import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mmlab.config.disk_errors import refusal
from mmlab.config.errors import DataError, RunError
from mmlab.config.locations import Location, Url, location
from mmlab.data.index import OLD_INDEX, ShardIndex
from mmlab.data.key_check import check_keys
from mmlab.data.manifest import Entry, Manifest, table_name
from mmlab.data.progress_bar import in_processes
from mmlab.data.scan import list_shards, local_folder, scan_shard
from mmlab.data.scan_notes import ScanNotes
from mmlab.data.shard_table import ShardTable, open_table, write_table
from mmlab.runs.disk import DRAFT, write_text, writing
from mmlab.runs.index_files import MANIFEST, index_folders

_OLD = 3600.0  # seconds, after which nobody writes a draft any more


@dataclass(frozen=True)
class Shard:
    """A shard to index.

    Attributes:
        name: of its file or object.
        size: in bytes.
        etag: of the object; None for a file.
        table_bytes: of its table in the store; None if there is none, or for a file.
        entry: of the manifest in the store, if the shard has the size and the ETag that it states.
    """

    name: str
    size: int
    etag: str | None = None
    table_bytes: int | None = None
    entry: Entry | None = None


@dataclass(frozen=True)
class Summary:
    """What the manifest takes from the table of a shard, and whether the shard was read for it."""

    entry: Entry
    notes: ScanNotes
    read: bool

    @classmethod
    def of(cls, name: str, path: Path, table: ShardTable, read: bool) -> "Summary":
        """The summary of a shard with an open table, whose file is `path`."""
        content, about = path.read_bytes(), table.about
        identity = about.hash, hashlib.sha256(content).hexdigest(), len(content), about.etag
        return cls(Entry(name, about.size, len(table), *identity, table.type_counts()), about.notes, read)


@dataclass(frozen=True)
class Indexed:
    """A set that was indexed.

    Attributes:
        root: of the set.
        manifest: of all shards.
        read: how many shards were read, because they had no table that fits them.
        replaced: whether an index of an earlier version was there.
    """

    root: Location
    manifest: Manifest
    read: int
    replaced: bool = False


class ShardPlace(Protocol):
    """Where shards and their tables lie. It is sent to other processes, which call `summary`."""

    @property
    def root(self) -> Location:
        """Of the set."""
        ...

    @property
    def required(self) -> tuple[str, ...]:
        """Members that each sample must have."""
        ...

    def shards(self) -> Sequence[Shard]:
        """All shards, sorted by name."""
        ...

    def unchanged(self, shards: Sequence[Shard]) -> Manifest | None:
        """The manifest of exactly these shards, if that is known without looking at their tables."""
        ...

    def summary(self, shard: Shard) -> Summary:
        """Summarize the table of a shard; the shard is read and its table written, if there is none that fits."""
        ...

    def hashes(self, entry: Entry) -> np.ndarray:
        """The hashes of the keys of a shard that was summarized."""
        ...

    def table(self, entry: Entry) -> ShardTable:
        """Open the table of a shard."""
        ...

    def finish(self, manifest: Manifest) -> bool:
        """Write the manifest and remove tables of shards that are gone; returns whether it replaces an old index."""
        ...


def build_index(
    root: str | Location, required: Iterable[str] = (), workers: int = 1, quiet: bool = False, elsewhere: bool = True
) -> ShardIndex:
    """Index a set of shards, see `index_set`, and open it."""
    return ShardIndex.open(index_set(root, required, workers, quiet, elsewhere).root)


def index_set(
    root: str | Location,
    required: Iterable[str] = (),
    workers: int = 1,
    quiet: bool = False,
    elsewhere: bool = True,
    again: bool = False,
) -> Indexed:
    """Read and verify the shards that changed since they were indexed, and write the index of the set.

    Several processes may do that at the same time, for equal or different parts: files are replaced as a whole, and
    equal shards have equal tables.

    Args:
        root: a folder or an address of `.tar` files, ours or foreign; other files are ignored.
        required: members that each sample must have; `jpg|png` requires one of them.
        workers: processes that read shards in parallel.
        quiet: show no progress.
        elsewhere: write the index of a read-only place into the user's cache, where `ShardIndex.open` finds it.
        again: read all shards.

    Raises:
        RunError: the index cannot be written.
        DataError: no shard, whatever `scan_shard` raises, or a key in two shards.
    """
    with _place(root, tuple(required), elsewhere, again) as place:
        shards = place.shards()
        manifest = None if again else place.unchanged(shards)
        if manifest is not None:
            return Indexed(place.root, manifest, 0)
        entries, notes, read = [], ScanNotes(), 0
        for summary in in_processes(place.summary, shards, "indexing shards", workers, quiet):
            entries.append(summary.entry)
            notes = notes.joined(summary.notes)
            read += summary.read
        samples = sum(entry.samples for entry in entries)
        if not samples:
            raise DataError(f"the shards of {place.root} hold no samples{notes.instead()}.")
        names = [entry.name for entry in entries]
        check_keys(place.root, names, lambda: map(place.hashes, entries), lambda s: place.table(entries[s]), samples)
        manifest = Manifest(entries, notes, place.required)
        return Indexed(place.root, manifest, read, place.finish(manifest))


def index_part(
    root: str | Location,
    part: tuple[int, int],
    required: Iterable[str] = (),
    workers: int = 1,
    quiet: bool = False,
    again: bool = False,
) -> tuple[int, int]:
    """Write only the tables of one part of the shards: part (k, n) has the shards k, k + n, … of all, from 1.

    Other arguments and errors are those of `index_set`, which joins the tables of all parts.

    Returns:
        How many shards the part has, and how many of them were read.
    """
    with _place(root, tuple(required), True, again) as place:
        shards = place.shards()[part[0] - 1 :: part[1]]
        read = [one.read for one in in_processes(place.summary, shards, "indexing shards", workers, quiet)]
        return len(read), sum(read)


def _place(
    root: str | Location, required: tuple[str, ...], elsewhere: bool, again: bool
) -> AbstractContextManager[ShardPlace]:
    if isinstance(place := location(root), Url):
        from mmlab.data.remote.remote_indexing import remote_place

        return remote_place(place, required, elsewhere, again)
    return _local_place(local_folder(root), required, elsewhere, again)


@dataclass(frozen=True)
class LocalShards:
    """A folder of shards, and the folder of their tables."""

    root: Path
    tables: Path
    required: tuple[str, ...]
    again: bool

    def shards(self) -> list[Shard]:
        return [Shard(path.name, path.stat().st_size) for path in list_shards(self.root)]

    def unchanged(self, shards: Sequence[Shard]) -> None:
        return None

    def summary(self, shard: Shard) -> Summary:
        path, file = self.root / shard.name, self.tables / table_name(shard.name)
        table = None if self.again else self._fresh(path, file)
        read = table is None
        if table is None:
            before = _state(path)
            table = scan_shard(path, self.required)
            if _state(path) != before:
                raise DataError(f"{path} changed while it was read; index it when it is complete.")
            write_table(file, table)
        return Summary.of(shard.name, file, table, read)

    def hashes(self, entry: Entry) -> np.ndarray:
        return self.table(entry).key_hashes

    def table(self, entry: Entry) -> ShardTable:
        return open_table(self.tables / entry.table_name, self.root)

    def finish(self, manifest: Manifest) -> bool:
        write_text(self.tables / MANIFEST, manifest.to_json())
        remove_other_tables(self.tables, manifest)
        beside, other = index_folders(self.root)
        old = [self.root / OLD_INDEX] if self.tables == beside else [other.with_name(f"{other.name}.npz")]
        replaced = [path for path in old if path.is_file()]
        for path in replaced:
            with suppress(OSError):
                path.unlink()
        return bool(replaced)

    def _fresh(self, path: Path, file: Path) -> ShardTable | None:
        """The table, if it is whole, younger than the shard, and states its size; a shard that was replaced is
        younger."""
        try:
            if file.stat().st_mtime_ns <= max(_state(path)[1:]):
                return None
            table = open_table(file, self.root)
            if (table.about.size, table.about.required) != (path.stat().st_size, self.required):
                return None
            table.check()
            return table
        except (OSError, DataError):
            return None


@contextmanager
def _local_place(folder: Path, required: tuple[str, ...], elsewhere: bool, again: bool) -> Iterator[LocalShards]:
    if not list_shards(folder):
        raise DataError(f"{folder} holds no .tar files.")
    beside, other = index_folders(folder)
    assert isinstance(beside, Path)
    tables, reason = writable_folder(beside, other if elsewhere else None)
    if reason:
        print(f"the index of {folder} is in {tables}: {reason}", file=sys.stderr)
    try:
        yield LocalShards(folder, tables, required, again)
    finally:
        with suppress(OSError):
            tables.rmdir()  # if it is empty: an index that fails leaves nothing


def writable_folder(folder: Path, other: Path | None) -> tuple[Path, str]:
    """Make a folder to write to, or another one if that is refused; returns it, and the reason for the other.

    Raises:
        RunError: both are refused, or the first one if there is no other.
    """
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink(missing_ok=True)
        return folder, ""
    except RunError as error:
        if other is None:
            raise
        try:
            with writing(other):
                other.mkdir(parents=True, exist_ok=True)
        except RunError:
            raise error from None
        return other, refusal(error) or str(error)


def remove_other_tables(folder: Path, manifest: Manifest) -> None:
    """Remove tables of shards that are gone, and drafts that killed processes have left behind."""
    kept = {entry.table_name for entry in manifest.entries}
    for path in folder.glob("*.safetensors"):
        with suppress(OSError):
            old = path.name.startswith(DRAFT) and path.stat().st_mtime < time.time() - _OLD
            if old or (path.name not in kept and not path.name.startswith(".")):
                path.unlink()


def _state(path: Path) -> tuple[int, int, int]:
    """Size of a file and the times of its last changes: a copy has an old time of its content, but a new one of its
    entry on this disk."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
