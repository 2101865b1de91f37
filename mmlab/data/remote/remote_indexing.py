"""Indexing shards in an object store: each is downloaded for as long as it is read, and its table is put beside it."""

import fcntl
import hashlib
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mmlab.config.errors import DataError, RunError
from mmlab.config.locations import Url
from mmlab.data.manifest import Entry, Manifest, table_name
from mmlab.data.remote.download import download, read_object, retried
from mmlab.data.remote.store import Blob, Store, open_store
from mmlab.data.remote.store_errors import MissingError, UnreachedError
from mmlab.data.scan import refuse_compressed, scan_shard
from mmlab.data.shard_places import Shard, Summary, fitting_table, remove_other_tables
from mmlab.data.shard_table import MALFORMED, ShardTable, header_length, open_table, read_header, write_table
from mmlab.runs.disk import write_text, writing
from mmlab.runs.index_files import MANIFEST, index_folders

UPLOADING = "uploading.json"
"""An object of the index while a set is uploaded."""
_DEADLINE = 3600.0  # seconds for one shard
_START = 1 << 16  # bytes of a table that are read for its header, which is seldom longer
_WORK = "mmlab-index-"
_OTHER_ETAGS: set[Url] = set()  # addresses whose ETags are no MD5, such as those of encrypted objects
_LEFT_BEHIND = 60.0  # seconds after which a folder without an owner is one


@dataclass(frozen=True)
class RemoteShards:
    """Shards below an address, with the place of their tables and a local folder for what is at work."""

    root: Url
    tables: Url | Path
    work: Path
    required: tuple[str, ...]
    again: bool

    def shards(self) -> list[Shard]:
        sizes, manifest = self._tables(), self._manifest()
        stated = manifest.entries if manifest and manifest.required == self.required else ()
        entries = {entry.name: entry for entry in stated}
        shards = []
        for blob in tars_of(self.root):
            entry, size = entries.get(blob.name), sizes.get(table_name(blob.name))
            same = entry is not None and (entry.bytes, entry.etag, entry.table_bytes) == (blob.size, blob.etag, size)
            shards.append(Shard(blob.name, blob.size, blob.etag, size, entry if same else None))
        return shards

    def unchanged(self, shards: Sequence[Shard]) -> Manifest | None:
        manifest = self._manifest()
        if manifest is None or manifest.required != self.required:
            return None
        return manifest if [shard.entry for shard in shards] == list(manifest.entries) else None

    def summary(self, shard: Shard) -> Summary:
        name = table_name(shard.name)
        if isinstance(self.tables, Path):
            file = self.tables / name
            table = self._fitting(file, shard) if shard.table_bytes else None
            read = table is None
            if table is None:
                write_table(file, table := scan_object(self.root, shard, self.work, self.required))
            return Summary.of(shard.name, file, table, read)
        if (summary := self._known(shard)) is not None:
            return summary
        file = self.work / name
        try:
            table = self._fitting(file, shard) if shard.table_bytes and self._fetched(name) else None
            read = table is None
            if table is None:
                write_table(file, table := scan_object(self.root, shard, self.work, self.required))
                put(self.tables, name, file)
            self._keep(shard, table.key_hashes.tobytes())
            return Summary.of(shard.name, file, table, read)
        finally:
            file.unlink(missing_ok=True)

    def hashes(self, entry: Entry) -> np.ndarray:
        if isinstance(self.tables, Path):
            return self.table(entry).key_hashes
        return np.fromfile(self._hashes(entry.name), np.uint64)

    def table(self, entry: Entry) -> ShardTable:
        if isinstance(self.tables, Path):
            return open_table(self.tables / entry.table_name, self.root)
        path = self.work / entry.table_name
        if not path.exists():
            download(_store(self.tables), entry.table_name, path)
        return open_table(path, self.root)

    def finish(self, manifest: Manifest) -> bool:
        if isinstance(self.tables, Path):
            write_text(self.tables / MANIFEST, manifest.to_json())
            remove_other_tables(self.tables, manifest)
            return False
        put(self.tables, MANIFEST, manifest.to_json().encode())
        kept = {entry.table_name for entry in manifest.entries}
        for name in self._tables().keys() - kept:
            discard(self.tables, name)
        return False

    def _known(self, shard: Shard) -> Summary | None:
        """The summary of a shard that the manifest lists; of its table, only the header and the hashes are read."""
        entry, size = shard.entry, shard.table_bytes
        if self.again or entry is None or size is None or not isinstance(self.tables, Url):
            return None
        try:
            data = self._read(entry, 0, min(size, _START))
            data += self._read(entry, len(data), max(header_length(data), len(data)))
            start, about, spans = read_header(data, size)
            stated = about.size, about.etag, about.required, about.hash, spans["key_ends"][0]
            if stated != (shard.size, shard.etag, self.required, entry.hash, (entry.samples,)):
                return None
            _, low, high = spans["key_hashes"]
            self._keep(shard, self._read(entry, start + low, start + high))
            return Summary(entry, about.notes, False)
        except (DataError, *MALFORMED):
            return None

    def _read(self, entry: Entry, start: int, stop: int) -> bytes:
        assert isinstance(self.tables, Url)
        store = _store(self.tables)
        return retried(lambda: store.read(entry.table_name, start, stop)[0]) if start < stop else b""

    def _fetched(self, name: str) -> bool:
        """Download a table into the work folder, if that is possible."""
        assert isinstance(self.tables, Url)
        try:
            download(_store(self.tables), name, self.work / name)
            return True
        except DataError:
            return False

    def _fitting(self, file: Path, shard: Shard) -> ShardTable | None:
        return None if self.again else fitting_table(file, self.root, shard, self.required)

    def _hashes(self, name: str) -> Path:
        return self.work / f"{name}.hashes"

    def _keep(self, shard: Shard, hashes: bytes) -> None:
        with writing(path := self._hashes(shard.name)):
            path.write_bytes(hashes)

    def _tables(self) -> dict[str, int]:
        """Sizes of the tables that are there."""
        if isinstance(self.tables, Path):
            return {path.name: path.stat().st_size for path in self.tables.glob("*.safetensors")}
        return {blob.name: blob.size for blob in listed(self.tables, ".safetensors")}

    def _manifest(self) -> Manifest | None:
        try:
            if isinstance(self.tables, Path):
                return Manifest.of((self.tables / MANIFEST).read_bytes())
            return Manifest.of(read_object(_store(self.tables), MANIFEST)[0])
        except (OSError, DataError, *MALFORMED):
            return None


def scan_object(root: Url, shard: Shard, work: Path, required: tuple[str, ...] = ()) -> ShardTable:
    """Download a shard and read it; once more if it is damaged and its ETag does not tell whether it arrived so."""
    copy = work / shard.name
    try:
        if not _download(root, shard, copy):
            with suppress(DataError):
                return scan_shard(copy, required, shard.etag, root / shard.name)
            _download(root, shard, copy)
        return scan_shard(copy, required, shard.etag, root / shard.name)
    finally:
        copy.unlink(missing_ok=True)


def _download(root: Url, shard: Shard, copy: Path) -> bool:
    """Download a shard; returns whether its ETag is the MD5 of what arrived, as S3's is of objects in one part."""
    wanted, digests = (shard.etag or "").strip('"'), list[str]()

    def check(path: Path) -> None:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "md5").hexdigest())
        if digests[-1] != wanted and digests.count(digests[-1]) < 2:
            raise DataError("its MD5 is not its ETag")

    can_check = re.fullmatch(r"[0-9a-f]{32}", wanted) is not None and root not in _OTHER_ETAGS
    limits: dict[str, Any] = {"size": shard.size, "etag": shard.etag, "deadline": _DEADLINE}
    download(_store(root), shard.name, copy, check=check if can_check else None, **limits)
    if can_check and digests[-1] != wanted:
        _OTHER_ETAGS.add(root)
    return bool(digests) and digests[-1] == wanted


@contextmanager
def remote_place(root: Url, required: tuple[str, ...], elsewhere: bool, again: bool) -> Iterator[RemoteShards]:
    """The shards below an address; their tables go beside them or, if that is refused, into the user's cache."""
    forget_stores()
    if not tars_of(root):
        raise DataError(f"{root} holds no .tar files.")
    beside, other = index_folders(root)
    assert isinstance(beside, Url)
    if listed(beside, UPLOADING):
        raise DataError(
            f"an upload to {root} was stopped, or is going on; repeat the command that builds it, or delete"
            f" {beside / UPLOADING}."
        )
    tables: Url | Path = beside
    try:
        check_writable(beside)
    except (DataError, RunError) as error:
        if not elsewhere or isinstance(error, UnreachedError):  # a later try may write there
            raise
        with writing(other):
            other.mkdir(parents=True, exist_ok=True)
        print(f"the index of {root} is in {other}: {str(error).rstrip('.')}", file=sys.stderr)
        tables = other
    with work_folder() as work:
        yield RemoteShards(root, tables, work, required, again)


def tars_of(root: Url) -> list[Blob]:
    """The `.tar` objects directly below an address, sorted by name.

    Raises:
        DataError: a compressed one; or the store cannot be listed.
    """
    blobs = listed(root, "")
    for blob in blobs:
        refuse_compressed(root / blob.name)
    return [blob for blob in blobs if blob.name.endswith(".tar")]


def listed(url: Url, suffix: str) -> list[Blob]:
    """The objects directly below an address; none for one that does not exist yet."""
    try:
        return retried(lambda: _store(url).list(suffix))
    except MissingError:
        return []


def check_writable(url: Url) -> None:
    """Raise DataError or RunError if objects below an address cannot be written."""
    probe = f".probe-{secrets.token_hex(8)}"  # of its own, so that no other process deletes it before it is seen
    retried(lambda: _store(url).write(probe, b"probe"))
    discard(url, probe)


def put(url: Url, name: str, source: Path | bytes) -> Blob:
    """Write an object, again after faults."""
    return retried(lambda: _store(url).write(name, source), _DEADLINE)


def discard(url: Url, name: str) -> None:
    """Delete an object that nothing reads, if that is allowed."""
    with suppress(DataError, RunError):
        retried(lambda: _store(url).delete(name))


def forget_stores() -> None:
    """Open the stores again, with the environment and the credentials as they are now."""
    _store.cache_clear()


@lru_cache
def _store(url: Url) -> Store:
    return open_store(url)


@contextmanager
def work_folder() -> Iterator[Path]:
    """A temporary folder; those that killed processes have left behind are removed."""
    place = Path(tempfile.gettempdir())
    for old in place.glob(f"{_WORK}*"):
        with suppress(OSError), (old / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - old.stat().st_mtime > _LEFT_BEHIND:
                shutil.rmtree(old, ignore_errors=True)
    with writing(place):
        work = Path(tempfile.mkdtemp(prefix=_WORK))
    try:
        with (work / "lock").open("a") as lock:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
