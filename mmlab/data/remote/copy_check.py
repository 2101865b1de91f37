"""The check of a copy in the shard cache: by the checksum of the object, or by those of the members of a shard."""

import hashlib
import os
import zlib
from pathlib import Path

from mmlab.config.errors import DataError
from mmlab.config.locations import Url
from mmlab.data.remote.wanted import Wanted

_PIECE = 1 << 24


def check_copy(entry: Wanted, path: Path, folder: Path) -> None:
    """Compare the bytes of a copy with the checksum of the object, or with those of the members of a shard.

    Args:
        entry: the object.
        path: its copy, under any name.
        folder: of the cache, where the table of a remote shard lies.

    Raises:
        DataError: they differ, or the table cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        if entry.sha256 and hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:  # type: ignore[arg-type]
            raise DataError(f"{entry.set}/{entry.name} has other contents than its index states.")
        if entry.table is None:
            return
        from mmlab.data.shard_table import open_table  # here, because it loads numpy

        table_path = folder / entry.table.path if isinstance(entry.table, Wanted) else Path(entry.table)
        table = open_table(table_path, Url(entry.set))
        for offset, length, crc in zip(table.offset.tolist(), table.length.tolist(), table.crc.tolist(), strict=True):
            found = 0
            for start in range(offset, offset + length, _PIECE):
                found = zlib.crc32(os.pread(file.fileno(), min(_PIECE, offset + length - start), start), found)
            if found != crc:
                raise DataError(f"{entry.set}/{entry.name} has other bytes at {offset} than its index states.")
