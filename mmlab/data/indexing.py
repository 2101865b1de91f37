"""Building the index of a set of shards: shard by shard, so that a killed build continues and only changes are read."""

import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from mmlab.config.disk_errors import refusal
from mmlab.config.errors import DataError, RunError
from mmlab.data.index import OLD_INDEX, ShardIndex
from mmlab.data.key_check import check_keys
from mmlab.data.manifest import Entry, Manifest, table_name
from mmlab.data.progress_bar import in_processes
from mmlab.data.scan import list_shards, local_folder, scan_shard
from mmlab.data.shard_table import ScanNotes, open_table, write_table
from mmlab.runs.disk import write_text, writing
from mmlab.runs.index_files import MANIFEST, index_folders


def build_index(
    root: str | Path, required: Iterable[str] = (), workers: int = 1, quiet: bool = False, elsewhere: bool = True
) -> ShardIndex:
    """Read and verify the shards of a folder that changed since they were indexed, and write its index.

    Args:
        root: a folder of `.tar` files, ours or foreign; other files are ignored.
        required: members that each sample must have; `jpg|png` requires one of them.
        workers: processes that read shards in parallel.
        quiet: show no progress.
        elsewhere: write the index of a read-only folder into the user's cache, where `ShardIndex.open` finds it.

    Raises:
        RunError: the index cannot be written.
        DataError: no shard, whatever `scan_shard` raises, or a key in two shards.
    """
    folder = local_folder(root)
    shards = list_shards(folder)
    if not shards:
        raise DataError(f"{folder} holds no .tar files.")
    tables = index_shards(folder, shards, tuple(required), workers, quiet, elsewhere)
    manifest = _manifest(folder, tables, [path.name for path in shards])
    write_text(tables / MANIFEST, manifest.to_json())
    _remove_others(tables, manifest)
    if tables.parent == folder:
        with suppress(OSError):
            (folder / OLD_INDEX).unlink(missing_ok=True)
    return ShardIndex.open(folder)


def index_shards(
    folder: Path, shards: Sequence[Path], required: tuple[str, ...], workers: int, quiet: bool, elsewhere: bool = True
) -> Path:
    """Write the tables of shards that have none, or an old one; returns the folder of the tables.

    Args:
        folder: of the set.
        shards: all of them, or some.
        required, workers, quiet, elsewhere: as for `build_index`.
    """
    tables = _writable(folder, elsewhere)
    todo = [path for path in shards if not _is_fresh(path, tables / table_name(path.name), required)]
    index = partial(_index_shard, tables=tables, required=required)
    for _ in in_processes(index, todo, "reading shards", workers, quiet):
        pass
    return tables


def _index_shard(path: Path, tables: Path, required: tuple[str, ...]) -> None:
    write_table(tables / table_name(path.name), scan_shard(path, required))


def _is_fresh(path: Path, table: Path, required: tuple[str, ...]) -> bool:
    """Whether a shard's table is younger than the shard and states its size; a file that was replaced is younger."""
    try:
        shard = path.stat()
        if table.stat().st_mtime_ns <= max(shard.st_mtime_ns, shard.st_ctime_ns):
            return False
        about = open_table(table).about
    except (OSError, DataError):
        return False
    return (about.size, about.required) == (shard.st_size, required)


def _writable(folder: Path, elsewhere: bool) -> Path:
    """The folder for the index: beside the shards, or in the user's cache."""
    beside, other = index_folders(folder)
    assert isinstance(beside, Path)
    there = beside.is_dir()
    try:
        with writing(beside):
            beside.mkdir(parents=True, exist_ok=True)
            probe = beside / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        return beside
    except RunError as error:
        if not elsewhere:
            raise
        try:
            with writing(other):
                other.mkdir(parents=True, exist_ok=True)
        except RunError:
            raise error from None
        print(f"the index of {folder} is in {other}: {refusal(error) or error}", file=sys.stderr)
        return other
    finally:
        if not there:
            with suppress(OSError):
                beside.rmdir()  # an index that fails leaves nothing


def _manifest(folder: Path, tables: Path, names: Sequence[str]) -> Manifest:
    """Join the tables of all shards; raises DataError without samples, or for a key in two shards."""
    paths = [tables / table_name(name) for name in names]
    entries, notes = [], ScanNotes()
    for name, path in zip(names, paths, strict=True):
        table = open_table(path)
        notes = notes.joined(table.about.notes)
        content, about = path.read_bytes(), table.about
        identity = about.hash, hashlib.sha256(content).hexdigest(), len(content), about.etag
        entries.append(Entry(name, about.size, len(table), *identity, table.type_counts()))
    if not any(entry.samples for entry in entries):
        raise DataError(f"the shards of {folder} hold no samples{notes.instead()}.")
    check_keys(folder, names, lambda: map(open_table, paths), sum(entry.samples for entry in entries))
    return Manifest(entries, notes)


def _remove_others(tables: Path, manifest: Manifest) -> None:
    """Remove tables of shards that are gone."""
    kept = {MANIFEST, *(entry.table_name for entry in manifest.entries)}
    for path in tables.iterdir():
        if path.name not in kept and path.suffix == ".safetensors":
            path.unlink()
