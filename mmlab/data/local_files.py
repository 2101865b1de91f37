"""The files of a set of shards on a local disk."""

import os
from pathlib import Path

from mmlab.config.errors import DataError
from mmlab.data.manifest import Entry

_OPEN_FILES = 32


class LocalFiles:
    """Reads shards and their tables from folders.

    Args:
        root: folder of the shards.
        tables: folder of the index.
    """

    def __init__(self, root: Path, tables: Path):
        self.root = root
        self.tables = tables
        self._open: dict[str, OpenFile] = {}

    def table(self, entry: Entry) -> Path:
        """The file of a shard's table."""
        return self.tables / entry.table_name

    def read(self, entry: Entry, offset: int, length: int, again: bool = False) -> bytes:
        """Read bytes of a shard; fewer at its end.

        Raises:
            DataError: the shard cannot be opened or read.
        """
        # pread carries its own offset, so a descriptor may be shared with forked workers and among threads.
        file = self._open.get(entry.name)
        if file is None:
            file = self._open[entry.name] = OpenFile(self.root / entry.name)
            while len(self._open) > _OPEN_FILES:
                self._open.pop(next(iter(self._open)), None)
        try:
            return os.pread(file.fd, length, offset)
        except OSError as error:
            raise DataError(f"{self.root / entry.name} cannot be read: {error.strerror}.") from None


class OpenFile:
    """A descriptor that closes with its last user, so that no reader loses it when the shard is dropped."""

    def __init__(self, path: Path):
        self.fd = -1
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"shard {path} cannot be opened: {error.strerror}.") from None

    def __del__(self):
        if self.fd >= 0:
            os.close(self.fd)
