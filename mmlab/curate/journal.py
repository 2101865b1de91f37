"""What a killed process leaves whole: rows appended to a file one by one, and files that are there or not.

A row that `append` returned from is on the disk. A process that dies while it writes leaves at most one torn line,
which the next writer cuts off.
"""

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from mmlab.config.errors import DataError, RunError
from mmlab.runs import disk

Row = dict[str, Any]


class Journal:
    """An append-only file of JSON lines with one writer; threads may share it.

    Args:
        path: the file, made on the first row.

    Attributes:
        rows: everything that is written, in order.

    Raises:
        DataError: a line in the middle is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows, self._size = _whole_rows(path)
        self._lock = threading.Lock()
        self._fd: int | None = None

    def append(self, row: Row) -> None:
        """Write a row and wait until it is on the disk.

        Raises:
            RunError: the disk takes no more; what was written before stays as it is.
        """
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self._lock:
            if self._fd is None:
                self._fd = self._open()
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._fd, line[written:])
                os.fsync(self._fd)
            except OSError as error:
                os.ftruncate(self._fd, self._size)
                raise RunError(f"{self.path} cannot be written: {error.strerror}.") from None
            self._size += len(line)
            self.rows.append(row)

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(fd, self._size)
        disk.sync_folder(self.path.parent)
        return fd

    def close(self) -> None:
        """Give the file back; the next row opens it again."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None


def read_rows(path: Path) -> list[Row]:
    """The rows of a journal that another process may be writing; nothing is changed.

    Raises:
        DataError: a line in the middle is damaged.
    """
    return _whole_rows(path)[0]


def _whole_rows(path: Path) -> tuple[list[Row], int]:
    """The rows, and the bytes that they take: without a last line that is torn."""
    data = path.read_bytes() if path.exists() else b""
    lines = data.split(b"\n")
    rows, size = [], 0
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError
        except ValueError:
            if number == len(lines) - 1:
                break  # a machine that lost its power can leave a last line of another content
            raise DataError(
                f"{path}, line {number}, is damaged; cut the file there, and the rest is made again."
            ) from None
        rows.append(row)
        size += len(line) + 1
    return rows, size


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file that is there completely or not at all, whenever the process dies.

    Raises:
        RunError: the disk takes no more.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        disk.sync_folder(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written: {error.strerror}.") from None


def claim(path: Path, doing: str) -> TextIO:
    """Make this process the only one that does what `path` stands for, until the returned file is closed.

    Args:
        path: a lock file; the system lets go of it when the process ends, in whatever way.
        doing: for the error, such as "curates into".

    Raises:
        ConfigError: a file is in the folder's place.
        RunError: another process has it.
    """
    disk.no_file(path.parent).mkdir(parents=True, exist_ok=True)
    taken = "{} {} {}; wait for it, or stop it."
    return disk.claim(path, f"process {os.getpid()}", lambda who: taken.format(who, doing, path.parent))


def by_key(rows: Sequence[Row]) -> dict[str, Row]:
    """Rows by their `key`; the first of a key counts."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row["key"], row)
    return found
