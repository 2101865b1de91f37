"""Building the index of a set of shards: shard by shard, so that a killed build continues and only changes are read."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from mmlab.config.errors import DataError
from mmlab.config.locations import Location, Url, location
from mmlab.data.index import ShardIndex
from mmlab.data.key_check import check_keys
from mmlab.data.manifest import Manifest
from mmlab.data.progress_bar import in_processes
from mmlab.data.scan import local_folder
from mmlab.data.scan_notes import ScanNotes
from mmlab.data.shard_places import ShardPlace, local_place


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
    return local_place(local_folder(root), required, elsewhere, again)
