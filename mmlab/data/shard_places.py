"""Places of shards whose tables are written, and a local folder as such a place."""

import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mmlab.config.disk_errors import refusal
from mmlab.config.errors import DataError, RunError
from mmlab.config.locations import Location
from mmlab.data.index import OLD_INDEX
from mmlab.data.manifest import Entry, Manifest, table_name
from mmlab.data.scan import list_shards, scan_shard
from mmlab.data.scan_notes import ScanNotes
from mmlab.data.shard_table import MALFORMED, ShardTable, open_table, write_table
from mmlab.runs.disk import DRAFT, write_text, writing
from mmlab.runs.index_files import INDEX_NAME, MANIFEST, index_folders

_OLD = 3600.0  # seconds, after which nobody writes a draft any more


@dataclass(frozen=True)
class Shard:
    """A shard to index.

    Attributes:
        name: of its file or object.
        size: in bytes.
        etag: of the object; None for a file.
        table_bytes: of its table in the store; None if there is none, or for a file.
        entry: of a manifest that requires the same; in a store, if the shard has the size and the ETag that it states.
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


@dataclass(frozen=True)
class LocalShards:
    """A folder of shards, and the folder of their tables."""

    root: Path
    tables: Path
    required: tuple[str, ...]
    again: bool

    def shards(self) -> list[Shard]:
        entries: dict[str, Entry] = {}
        with suppress(OSError, *MALFORMED):
            manifest = Manifest.of((self.tables / MANIFEST).read_bytes())
            if manifest.required == self.required:
                entries = {entry.name: entry for entry in manifest.entries}
        shards = list_shards(self.root)
        return [Shard(path.name, path.stat().st_size, entry=entries.get(path.name)) for path in shards]

    def unchanged(self, shards: Sequence[Shard]) -> None:
        return None

    def summary(self, shard: Shard) -> Summary:
        path, file = self.root / shard.name, self.tables / table_name(shard.name)
        table = None if self.again else self._fresh(shard, file)
        if table is None and not self.again:
            table = self._beside(shard, file)
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

    def _beside(self, shard: Shard, file: Path) -> ShardTable | None:
        """The table that lies beside a shard in a read-only folder, if it fits; it is copied."""
        beside = self.root / INDEX_NAME / file.name
        if beside == file or (table := self._fresh(shard, beside)) is None:
            return None
        write_table(file, table)
        return table

    def _fresh(self, shard: Shard, file: Path) -> ShardTable | None:
        """The table, if it fits and is younger than the shard; a shard that was replaced is younger."""
        try:
            younger = file.stat().st_mtime_ns > max(_state(self.root / shard.name)[1:])
        except OSError:
            return None
        return fitting_table(file, self.root, shard, self.required) if younger else None


@contextmanager
def local_place(folder: Path, required: tuple[str, ...], elsewhere: bool, again: bool) -> Iterator[LocalShards]:
    if not list_shards(folder):
        raise DataError(f"{folder} holds no .tar files.")
    beside, other = index_folders(folder)
    assert isinstance(beside, Path)
    if beside.is_file():
        raise DataError(f"{beside} is a file, but its name is that of the folder of the index; rename the file.")
    tables, reason = writable_folder(beside, other if elsewhere else None)
    if reason:
        print(f"the index of {folder} is in {tables}: {reason}", file=sys.stderr)
    try:
        yield LocalShards(folder, tables, required, again)
    finally:
        with suppress(OSError):
            tables.rmdir()  # if it is empty: an index that fails leaves nothing


def fitting_table(file: Path, root: Location, shard: Shard, required: tuple[str, ...]) -> ShardTable | None:
    """Open the table of a shard, if it is whole and states the shard's size and ETag, and what is required.

    Where the manifest has the same contents, the table must also be the one that the manifest states.
    """
    try:
        table = open_table(file, root)
        if (table.about.size, table.about.etag, table.about.required) != (shard.size, shard.etag, required):
            return None
        table.check()
        entry, about = shard.entry, table.about
        if entry and (entry.hash, entry.bytes, entry.etag) == (about.hash, about.size, about.etag):
            return table if hashlib.sha256(file.read_bytes()).hexdigest() == entry.table else None
        return table
    except (DataError, OSError):
        return None


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
