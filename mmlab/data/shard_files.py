"""Writing samples as shards."""

import json
import os
import shutil
import tarfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, DataError
from mmlab.config.locations import Location, Url, location
from mmlab.data.formats import Members, check_extension, check_key
from mmlab.data.index import OLD_INDEX, ShardIndex
from mmlab.data.indexing import build_index
from mmlab.data.progress_bar import progress
from mmlab.data.tally import Tally
from mmlab.runs.disk import writing
from mmlab.runs.index_files import INDEX_NAME, upload_draft

Samples = Generator[tuple[str, Members], None, Tally]
"""A converter: it yields (key, members) of each row that can be trained on, and returns the counts of all rows."""


class NumberedTars:
    """Tars `shard-000000.tar`, … of a folder, with the same number of samples in each; equal samples give equal bytes.

    Args:
        folder: an existing folder.
        max_samples: samples per tar.
        count, offset: continue after so many samples, the last of which ends at this byte of its tar.
    """

    def __init__(self, folder: Path, max_samples: int, count: int = 0, offset: int = 0):
        self.folder = folder
        self.max_samples = max_samples
        self.count = count
        self._writer: Any = None
        self._file: Any = None
        if count % max_samples:
            self._open(offset)
        tars = sorted(folder.glob("shard-*.tar"))[: -(-count // max_samples)]
        for path in set(folder.iterdir()).difference(tars):  # such as an index
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write(self, key: str, members: Members) -> bool:
        """Append a sample; a text is written as UTF-8, a dict as sorted JSON. Returns whether its tar is full."""
        if self._writer is None:
            self._open(0)
        assert self._writer is not None
        self._writer.write({"__key__": key, **{name: _encode(value) for name, value in members.items()}})
        self.count += 1
        if self.count % self.max_samples == 0:
            self.close()
        return self._writer is None

    def flush(self) -> tuple[int, int]:
        """Write what is buffered; return (number of samples, the byte of the open tar where the last one ends)."""
        if self._writer is None:
            return self.count, 0
        self._file.flush()
        return self.count, self._file.tell()

    def close(self) -> None:
        """End the open tar."""
        if self._writer is not None:
            self._writer.close()
            self._file.close()
            self._writer = self._file = None

    def _open(self, offset: int) -> None:
        from webdataset.writer import TarWriter  # here, because it loads torch

        path = self.folder / f"shard-{self.count // self.max_samples:06d}.tar"
        self._file = open(path, "r+b" if offset else "wb")  # noqa: SIM115
        self._file.truncate(offset)
        self._file.seek(offset)
        self._writer = TarWriter(self._file, user="", group="", mode=0o644, encoder=False, mtime=0)
        # webdataset's own stream buffers, and would pad a continued tar by its length from here.
        self._writer.tarstream = tarfile.open(fileobj=self._file, mode="w")  # noqa: SIM115


class ShardWriter:
    """Writes samples into numbered tars, in a folder that gets its name, or is uploaded, only when it is complete.

    The shards have webdataset's format, and equal samples give equal bytes. Use it as a context manager: an error or
    a killed process leaves nothing under `root`.

    Attributes:
        index: the `ShardIndex` of the finished set, after the context has ended.
    """

    index: ShardIndex

    def __init__(self, root: str | Location, max_samples: int = 1000, overwrite: bool = False, quiet: bool = False):
        """
        Args:
            root: the folder or the address to make; what is uploaded to an address is in the user's cache before.
            max_samples: samples per shard.
            overwrite: replace an earlier set of shards at `root`.
            quiet: show no progress.

        Raises:
            ConfigError: `root` is not empty, or with `overwrite` has files that do not belong to a set of shards.
        """
        if max_samples < 1:
            raise ConfigError(f"a shard holds at least one sample, not {max_samples}.")
        self.root = location(root).resolve()
        self.max_samples = max_samples
        self.quiet = quiet
        check_destination(self.root, overwrite)
        self._local = upload_draft(self.root) if isinstance(self.root, Url) else self.root
        self._building = self._local.with_name(f"{self._local.name}.tmp-{os.getpid()}")
        self._keys: set[str] = set()
        self._tars: Any = None

    def __enter__(self) -> "ShardWriter":
        if self._building.exists():
            shutil.rmtree(self._building)
        with writing(self._local):
            self._building.mkdir(parents=True)
        self._tars = NumberedTars(self._building, self.max_samples)
        return self

    def write(self, key: str, members: Members) -> None:
        """Append one sample, see `NumberedTars.write`.

        Raises:
            DataError: an unsafe or repeated key, a member that is not in `EXTENSIONS`, or no member.
        """
        if key in self._keys:
            raise DataError(f"key '{key}' was written twice.")
        check_members(key, members)
        self._keys.add(key)
        with writing(self._local):
            self._tars.write(key, members)

    def __exit__(self, kind, error, trace) -> None:
        try:
            with writing(self._local):
                self._tars.close()
                if kind is None:
                    self._finish()
        finally:
            shutil.rmtree(self._building, ignore_errors=True)

    def _finish(self) -> None:
        if not self._keys:
            raise DataError(f"there are no samples to write to {self.root}.")
        build_index(self._building, quiet=self.quiet, elsewhere=False)
        (self.index,) = put_in_place([(self._building, self.root)], self.quiet)


def write_shards(
    samples: Samples,
    root: str | Location,
    max_samples: int = 1000,
    overwrite: bool = False,
    total: int | None = None,
    quiet: bool = False,
) -> tuple[ShardIndex, Tally]:
    """Write the samples of a converter; return the new index and the converter's counts.

    Raises:
        DataError: what the converter and `ShardWriter` raise, or no row is left.
    """
    tally = Tally()

    def counted():
        nonlocal tally
        tally = yield from samples

    with ShardWriter(root, max_samples, overwrite, quiet) as writer:
        for key, members in progress(counted(), "writing samples", total, quiet):
            writer.write(key, members)
        if tally.rows and not tally.written:
            raise DataError(f"none of {tally.rows} rows can be used: {'; '.join(tally.lines())}")
    return writer.index, tally


def check_members(key: str, members: Members) -> None:
    """Raise DataError for an unsafe key, a member that is not in `EXTENSIONS`, or no member."""
    check_key(key)
    if not members:
        raise DataError(f"sample '{key}' is empty.")
    for extension in members:
        check_extension(extension, f"{key}.{extension}")


def put_in_place(folders: Sequence[tuple[Path, Location]], quiet: bool = False) -> list[ShardIndex]:
    """Give complete, indexed folders their names, or upload them, in place of earlier ones."""
    if uploads := [(folder, root) for folder, root in folders if isinstance(root, Url)]:
        from mmlab.data.remote.upload import upload_sets

        return upload_sets(uploads, quiet)
    return [_renamed(folder, root) for folder, root in folders if isinstance(root, Path)]


def _renamed(folder: Path, root: Path) -> ShardIndex:
    root.parent.mkdir(parents=True, exist_ok=True)
    old = root.with_name(f"{root.name}.old-{os.getpid()}")
    if root.exists():
        root.rename(old)
    folder.rename(root)
    shutil.rmtree(old, ignore_errors=True)
    return ShardIndex.open(root)


def _encode(value: bytes | str | dict[str, Any]) -> bytes:
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()
    return value.encode() if isinstance(value, str) else value


def check_destination(root: Location, overwrite: bool) -> None:
    """Raise ConfigError if shards cannot be written to a folder or below an address because of what is there."""
    if isinstance(root, Url):
        from mmlab.data.remote.upload import check_bucket

        return check_bucket(root, overwrite)
    if root.is_file():
        raise ConfigError(f"{root} is a file; shards are written to a folder.")
    names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    if names and not overwrite:
        raise ConfigError(f"{root} is not empty; give another folder or --overwrite (overwrite=True).")
    foreign = [name for name in names if name not in (INDEX_NAME, OLD_INDEX) and not name.endswith(".tar")]
    if foreign:
        raise ConfigError(f"{root} cannot be replaced: '{foreign[0]}' in it is not part of a set of shards.")
