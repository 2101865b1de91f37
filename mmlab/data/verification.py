"""Reading shards again, byte by byte, to compare them with their index."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mmlab.config.errors import DataError
from mmlab.config.locations import Location, Url
from mmlab.data.index import ShardIndex
from mmlab.data.manifest import Entry
from mmlab.data.progress_bar import in_processes
from mmlab.data.scan import scan_shard
from mmlab.data.shard_table import ShardTable


def verify(index: ShardIndex, shards: Sequence[int] | None = None, workers: int = 1, quiet: bool = False) -> None:
    """Read every byte of shards and compare it with the index.

    Remote shards are fetched one at a time (by each worker) into a temporary folder; sizes and ETags are compared for
    all of them.

    Args:
        index: open shards.
        shards: numbers of those that are read; None: all.
        workers: processes that read shards in parallel.
        quiet: show no progress.

    Raises:
        DataError: naming the shard and the first sample in it that differs.
    """
    if isinstance(index.root, Url):
        _check_listing(index, index.root)
    numbers = list(range(len(index.shards)) if shards is None else shards)
    entries = [index.manifest.entries[number] for number in numbers]
    scans = in_processes(partial(_scan, index.root), entries, "reading shards", workers, quiet)
    for number, entry, scan in zip(numbers, entries, scans, strict=True):
        _compare(index.root / entry.name, index.table(number), scan)


def _scan(root: Location, entry: Entry) -> ShardTable:
    if isinstance(root, Path):
        return scan_shard(root / entry.name)
    from mmlab.data.remote.remote_indexing import scan_object, work_folder
    from mmlab.data.shard_places import Shard

    with work_folder() as work:
        return scan_object(root, Shard(entry.name, entry.bytes, entry.etag), work)


def _check_listing(index: ShardIndex, root: Url) -> None:
    """Compare names, sizes and ETags of all shards with the manifest, if the store can list them."""
    from mmlab.data.remote.remote_indexing import tars_of
    from mmlab.data.remote.store import HTTP

    if root.scheme not in HTTP:
        index.check_shards({blob.name: (blob.size, blob.etag) for blob in tars_of(root)})


def _compare(place: Location, table: ShardTable, scan: ShardTable) -> None:
    if table.keys() != scan.keys():
        raise DataError(f"{place} does not hold the samples that its index lists.")
    for name in ("first", "extension", "offset", "length", "crc"):
        differs = np.flatnonzero(getattr(table, name) != getattr(scan, name))
        if len(differs):
            j = int(np.searchsorted(table.first, differs[0], side="right")) - 1
            raise DataError(
                f"{place} changed since it was indexed: sample '{table.key(j)}' has the first of"
                f" {len(differs)} members with another {'checksum' if name == 'crc' else name}."
            )
