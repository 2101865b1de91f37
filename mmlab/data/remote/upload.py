"""Putting a finished set of shards into an object store, so that a set that was cut is never a valid one."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from mmlab.config.errors import ConfigError, DataError
from mmlab.config.locations import Url, split_address
from mmlab.data.config import CacheConfig
from mmlab.data.index import ShardIndex
from mmlab.data.manifest import Entry, Manifest
from mmlab.data.progress_bar import progress
from mmlab.data.remote.download import download
from mmlab.data.remote.remote_files import RemoteFiles
from mmlab.data.remote.remote_indexing import UPLOADING, check_writable, discard, forget_stores, listed, put
from mmlab.data.remote.store import HTTP, Blob, open_store
from mmlab.data.shard_places import Summary
from mmlab.data.shard_table import open_table, write_table
from mmlab.runs.index_files import INDEX_NAME, MANIFEST

_AT_ONCE = 4  # shards


def check_bucket(url: Url, overwrite: bool) -> None:
    """Check that shards can be written below an address.

    Raises:
        ConfigError: the address has a login; something is there that an upload that was cut has not left; or, with
            `overwrite`, something that does not belong to a set of shards.
        DataError: objects cannot be written there.
    """
    split_address(url)
    if url.scheme in HTTP:
        raise ConfigError(
            f"{url} is a web server; shards are written to a folder or a bucket, such as s3://bucket/set."
        )
    forget_stores()
    names = [blob.name for blob in listed(url, "")]
    if names and not overwrite and not listed(url / INDEX_NAME, UPLOADING):
        raise ConfigError(f"{url} is not empty; give another address or --overwrite (overwrite=True).")
    if foreign := next((name for name in names if not name.endswith(".tar")), None):
        raise ConfigError(f"{url} cannot be replaced: '{foreign}' in it is not part of a set of shards.")
    check_writable(url / INDEX_NAME)


def upload_sets(folders: Sequence[tuple[Path, Url]], quiet: bool = False) -> list[ShardIndex]:
    """Upload indexed sets of shards from local folders; what an upload that was cut has left there is kept.

    Everything else there that belongs to a set of shards is replaced. The manifest of each set is written last. Until
    all of them are there, each has a mark, with which the same build continues.

    Raises:
        DataError: an object cannot be written.
    """
    indexes = [_upload_set(folder, url, quiet) for folder, url in folders]
    for _, url in folders:
        discard(url / INDEX_NAME, UPLOADING)
    return indexes


def _upload_set(folder: Path, url: Url, quiet: bool) -> ShardIndex:
    local, index = ShardIndex.open(folder), url / INDEX_NAME
    put(index, UPLOADING, b"{}\n")
    discard(index, MANIFEST)
    shards, tables = (
        {blob.name: blob for blob in listed(*place)} for place in ((url, ".tar"), (index, ".safetensors"))
    )
    if listed(index, MANIFEST):
        raise DataError(f"{index / MANIFEST} cannot be deleted, so {url} cannot be replaced.")
    work = partial(_upload, folder, url, shards, tables)
    entries = local.manifest.entries
    with _threads() as pool:
        uploaded = list(progress(pool.map(work, entries), "uploading shards", len(entries), quiet))
    for name in shards.keys() - {entry.name for entry in entries}:
        discard(url, name)
    for name in tables.keys() - {entry.table_name for entry in entries}:
        discard(index, name)
    manifest = Manifest(uploaded, local.manifest.notes, local.manifest.required)
    put(index, MANIFEST, manifest.to_json().encode())
    return ShardIndex(url, manifest, RemoteFiles(url, CacheConfig()))


def _upload(folder: Path, url: Url, shards: dict[str, Blob], tables: dict[str, Blob], entry: Entry) -> Entry:
    """Upload a shard and then its table, unless both are there."""
    index, table = url / INDEX_NAME, open_table(folder / INDEX_NAME / entry.table_name, folder)
    blob, copy = shards.get(entry.name), tables.get(entry.table_name)
    with TemporaryDirectory() as work:
        path = Path(work) / entry.table_name
        if blob is not None and copy is not None and blob.size == entry.bytes:
            write_table(path, replace(table, about=replace(table.about, etag=blob.etag)))
            there = Path(work) / "there"
            download(open_store(index), entry.table_name, there)
            if there.read_bytes() == path.read_bytes():
                return Summary.of(entry.name, path, open_table(path, url), False).entry
        blob = put(url, entry.name, folder / entry.name)
        write_table(path, replace(table, about=replace(table.about, etag=blob.etag)))
        put(index, entry.table_name, path)
        return Summary.of(entry.name, path, open_table(path, url), False).entry


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that start nothing new after an error."""
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
