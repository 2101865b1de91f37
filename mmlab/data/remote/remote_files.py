"""The files of a set of shards in an object store, as the readers of one process see them."""

import os
import re
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from mmlab.config.errors import DataError
from mmlab.config.locations import Url, split_address
from mmlab.data.config import CacheConfig
from mmlab.data.local_files import OpenFile
from mmlab.data.manifest import Entry, Manifest
from mmlab.data.remote.fetch_client import FetchClient
from mmlab.data.remote.wanted import Wanted
from mmlab.data.shard_table import MALFORMED
from mmlab.runs.index_files import INDEX_NAME, MANIFEST, index_folders

_MANIFEST = f"{INDEX_NAME}/{MANIFEST}"
_LEAST = 1 << 17  # bytes of a range: the members of a sample are adjacent
T = TypeVar("T")
Shards = Sequence[tuple["RemoteFiles", Entry]]


def open_remote(root: Url, cache: CacheConfig | None = None) -> tuple[Manifest, "RemoteFiles"]:
    """Read the manifest of a set from its address, or from the folder elsewhere that an index of it was written to.

    Raises:
        ConfigError: the address has a login, or is of no store.
        DataError: there is no index, or the store cannot be read.
    """
    split_address(root)
    cache = cache or CacheConfig()
    client = reader_of(cache).client
    try:
        size, etag = client.stat(str(root), _MANIFEST)
        if etag is None:  # nothing tells whether a copy is the same
            return _parsed(client.read(str(root), _MANIFEST), root), RemoteFiles(root, cache)
        wanted = Wanted(str(root), _MANIFEST, size, etag)
        copy = client.file(wanted)
        try:
            manifest = _parsed(copy.read_bytes(), root)
        except DataError:  # other bytes may come next time
            copy = client.file(wanted, again=True)
            manifest = _parsed(copy.read_bytes(), root)
        return manifest, RemoteFiles(root, cache, None, copy)
    except DataError as error:
        elsewhere = index_folders(root)[1]
        if (elsewhere / MANIFEST).is_file():
            return _parsed((elsewhere / MANIFEST).read_bytes(), root), RemoteFiles(root, cache, elsewhere)
        if str(error) != f"there is no {root / _MANIFEST}.":
            raise
        raise _no_index(root, client, error) from None


class RemoteFiles:
    """Reads shards from the shard cache if this process wants them, and else in ranges from the store.

    An unpickled or forked copy opens its own files.

    Args:
        root: address of the set.
        cache: settings of the shard cache.
        tables: folder of the index; None: it is beside the shards.
        copy: of the manifest that was read, if it has one.
    """

    def __init__(self, root: Url, cache: CacheConfig, tables: Path | None = None, copy: Path | None = None):
        self.root, self.cache, self.tables, self.copy = root, cache, tables, copy
        self._open: dict[str, tuple[OpenFile, str]] = {}  # name → copy, path of its object
        self._range: tuple[str, int, bytes] = "", 0, b""  # the last one: shard, start, bytes
        _FILES.add(self)

    def __reduce__(self):
        return RemoteFiles, (self.root, self.cache, self.tables, self.copy)

    def manifest(self, content_hash: str) -> Manifest:
        """The manifest with this hash, for a worker: from its copy, if that is still there.

        Raises:
            DataError: the index was rebuilt.
        """
        path = self.tables / MANIFEST if self.tables else self.copy
        try:
            if path is not None and (manifest := Manifest.of(path.read_bytes())).hash == content_hash:
                return manifest
        except (OSError, *MALFORMED):
            pass
        manifest, _ = open_remote(self.root, self.cache)
        if manifest.hash != content_hash:
            raise _rebuilt(self.root)
        return manifest

    def table(self, entry: Entry) -> Path:
        """The file of a shard's table; it may be deleted after the next request of this process."""
        return self.tables / entry.table_name if self.tables else self._file(self._table(entry), entry)

    def read(self, entry: Entry, offset: int, length: int, again: bool = False) -> bytes:
        """Read bytes of a shard; fewer at its end.

        Args:
            entry: the shard.
            offset, length: the bytes.
            again: they were wrong: the shard's copy is compared with its checksums, and fetched again if it differs.

        Raises:
            DataError: the shard cannot be fetched or read, or has changed.
        """
        file, _ = (None, "") if again else self._open.get(entry.name, (None, ""))
        if file is None:
            wanted = self.object(entry)
            is_present = wanted.path in reader_of(self.cache).present
            if not is_present and not again:
                return self._ranged(wanted, entry, offset, length)
            file = open_copy(lambda: self._file(wanted, entry, again), OpenFile, self.root / entry.name)
            if is_present:
                self._open[entry.name] = file, wanted.path
        try:
            return os.pread(file.fd, length, offset)
        except OSError as error:
            raise DataError(f"the copy of {self.root / entry.name} cannot be read: {error.strerror}.") from None

    def object(self, entry: Entry) -> Wanted:
        """What the fetcher is asked for to get a shard."""
        table = str(self.table(entry)) if self.tables else self._table(entry)
        return Wanted(str(self.root), entry.name, entry.bytes, entry.etag, hash=entry.hash, table=table)

    def keep(self, present: set[str]) -> None:
        """Close the copies of all shards but some, by the paths of their objects."""
        for name in [name for name, (_, path) in self._open.items() if path not in present]:
            del self._open[name]

    def close(self) -> None:
        """Close all copies of shards."""
        self._open.clear()

    def _table(self, entry: Entry) -> Wanted:
        name = f"{INDEX_NAME}/{entry.table_name}"
        return Wanted(str(self.root), name, entry.table_bytes, sha256=entry.table)

    def _file(self, wanted: Wanted, entry: Entry, again: bool = False) -> Path:
        with reader_of(self.cache).waiting() as client:
            try:
                return client.file(wanted, again)
            except DataError as error:
                raise self._explained(error, entry) from None

    def _ranged(self, wanted: Wanted, entry: Entry, offset: int, length: int) -> bytes:
        name, start, data = self._range
        if name != entry.name or not start <= offset <= offset + length <= start + len(data):
            stop = min(offset + max(length, _LEAST), entry.bytes)
            with reader_of(self.cache).waiting() as client:
                try:
                    data = client.range(wanted, offset, stop) if offset < stop else b""
                except DataError as error:
                    raise self._explained(error, entry) from None
            start = offset
            self._range = entry.name, start, data
        return data[offset - start : offset - start + length]

    def _explained(self, error: DataError, entry: Entry) -> DataError:
        """The error of the fetcher, or that the index was rebuilt: its tables then differ from the manifest."""
        if self.tables is not None or not re.search("changed|wrong content|shorter|there is no", str(error)):
            return error
        try:
            manifest = _parsed(reader_of(self.cache).client.read(str(self.root), _MANIFEST), self.root)
        except DataError:
            return error
        same = any(entry == other for other in manifest.entries)
        return error if same else _rebuilt(self.root)


class Reader:
    """This process's connection to a shard cache, and what its loaders want.

    Attributes:
        client: the connection.
        present: paths of the objects that are read now.
        waited: seconds in which reading waited for the fetcher.
    """

    def __init__(self, cache: CacheConfig):
        self.client = FetchClient(cache.path, cache.bytes, cache.deadline)
        self.present: set[str] = set()
        self.waited = 0.0
        self._wants: weakref.WeakKeyDictionary[object, tuple[Shards, Shards, Shards]] = weakref.WeakKeyDictionary()

    def want(self, loader: object, present: Shards, next: Shards = (), ahead: Shards = ()) -> None:
        """Replace what one loader wants, each list in the order of use; copies that none reads now are closed.

        Raises:
            DataError: the shards that are read now do not fit into the cache.
        """
        self._wants[loader] = present, next, ahead
        uses = [in_turn(shards) for shards in zip(*self._wants.values(), strict=True)]
        objects = [[files.object(entry) for files, entry in shards] for shards in uses]
        self.present = {wanted.path for wanted in objects[0]}
        for files in list(_FILES):
            files.keep(self.present)
        self.client.want(*objects)

    @contextmanager
    def waiting(self) -> Iterator[FetchClient]:
        """Give the connection; the time within the block counts as waiting."""
        start = time.monotonic()
        try:
            yield self.client
        finally:
            self.waited += time.monotonic() - start


def reader_of(cache: CacheConfig) -> Reader:
    """This process's reader of a shard cache."""
    key = cache.path, cache.bytes, cache.deadline
    if key not in _READERS:
        _READERS[key] = Reader(cache)
    return _READERS[key]


def open_copy(fetch: Callable[[], Path], opened: Callable[[Path], T], shard: Url) -> T:
    """Open the copy of a shard, which somebody may delete before it is open.

    Args:
        fetch: returns its path when it is there.
        opened: opens it.
        shard: its address.

    Raises:
        DataError: it cannot be opened; and whatever `fetch` raises.
    """
    for _ in range(3):
        path = fetch()
        try:
            return opened(path)
        except DataError:
            if path.exists():
                raise
    raise DataError(f"the copy of {shard} is deleted again and again by another program.")


def in_turn(lists: Iterable[Iterable[T]]) -> list[T]:
    """The items of several lists, one of each in turn."""
    return [item for items in zip_longest(*lists, fillvalue=_NONE) for item in items if item is not _NONE]  # type: ignore[misc]


def _parsed(text: bytes, root: Url) -> Manifest:
    try:
        return Manifest.of(text)
    except MALFORMED as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"the index of {root} cannot be read ({reason}); rebuild it with `mmlab shards index {root}`."
        ) from None


def _no_index(root: Url, client: FetchClient, missing: DataError) -> DataError:
    """The error for a missing manifest: without a bucket, it is another one."""
    try:
        client.range(Wanted(str(root), _MANIFEST, 1), 0, 1)
    except DataError as error:
        if str(error) != str(missing):
            return error
    return DataError(f"{root} has no index; build it with `mmlab shards index {root}`.")


def _rebuilt(root: Url) -> DataError:
    return DataError(f"the index of {root} was rebuilt with other contents while it was in use.")


_NONE = object()
_FILES: "weakref.WeakSet[RemoteFiles]" = weakref.WeakSet()
_READERS: dict[Hashable, Reader] = {}


def _after_fork() -> None:
    _READERS.clear()
    for files in list(_FILES):
        files.close()


os.register_at_fork(after_in_child=_after_fork)
