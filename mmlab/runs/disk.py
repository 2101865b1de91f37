"""Locks, atomic writes and checks of files and folders."""

import errno
import fcntl
import json
import math
import os
import platform
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from mmlab.config.disk_errors import refusal
from mmlab.config.errors import ConfigError, RunError, UserError
from mmlab.config.locations import refuse_address

DRAFT = ".draft-"


def claim(path: Path, doing: str) -> TextIO:
    """Lock a file until the returned file is closed or the process ends.

    On a file system without locks every claim succeeds.

    Args:
        path: the lock file, created if missing; the owner's process id and machine are written into it.
        doing: what the owner does with the file's folder, for the error, such as "is training".

    Raises:
        RunError: another process holds the lock, or the file cannot be created.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise RunError(f"{owner} {doing} {path.parent}; wait for it, or stop it.") from None
    except OSError:
        return file
    with suppress(OSError):  # on a full disk the lock still holds
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    return file


def locked(path: Path) -> bool:
    """Whether another process holds the lock of a file, which may not exist; the lock is not taken."""
    try:
        file = path.open("rb")
    except OSError:
        return False
    with file:
        try:
            os.lockf(file.fileno(), os.F_TEST, 0)
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def no_file(folder: Path) -> Path:
    """Return an output folder, existing or not.

    Raises:
        ConfigError: the path is a file or an address.
    """
    refuse_address(folder)
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; give a folder as out=…")
    return folder


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise one sentence if the disk does not let the block write `path`.

    Raises:
        RunError: the disk is full or read-only, or a permission is missing.
    """
    try:
        yield
    except Exception as error:
        reason = refusal(error)
        if reason is None or isinstance(error, UserError):
            raise
        raise RunError(f"{path} cannot be written: {reason}; everything saved earlier is unchanged.") from error


@contextmanager
def writing_later(path: Path) -> Iterator[None]:
    """Only warn if the disk does not let the block write a file that is written again later."""
    try:
        with writing(path):
            yield
    except RunError as error:
        print(f"WARNING: {error}", file=sys.stderr, flush=True)


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a draft beside `path`, a file or a folder to be written, which takes its place when the block ends.

    A killed process, an error or a full disk leaves `path` as it was. Only a folder takes two renames; a kill between
    them leaves the earlier folder beside `path`, as a draft that ends in `.old`.

    Args:
        path: to be written.
        sync: wait until the draft is on the disk, so that a machine that fails leaves `path` as it was, too; it takes
            too long for thousands of files that can be made again.

    Raises:
        RunError: the disk is full or read-only, or a permission is missing.
    """
    path = Path(os.path.abspath(path))
    draft = path.with_name(f"{DRAFT}{os.getpid()}-{threading.get_ident()}-{path.name}")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield draft
            files = [file for file in draft.rglob("*") if file.is_file()] if draft.is_dir() else [draft]
            for file in files if sync else ():
                _sync(file)
            for folder in {file.parent for file in files if file != draft} if sync else ():
                sync_folder(folder)
            if draft.is_dir() and path.is_dir():
                path.rename(old := draft.with_name(f"{draft.name}.old"))
                try:
                    draft.rename(path)
                except OSError:
                    old.rename(path)
                    raise
                shutil.rmtree(old, ignore_errors=True)
            else:
                draft.replace(path)
            if sync:
                sync_folder(path.parent)
        finally:
            if draft.is_dir():
                shutil.rmtree(draft, ignore_errors=True)
            else:
                with suppress(OSError):
                    draft.unlink(missing_ok=True)


def write_text(path: Path, text: str | bytes) -> None:
    """Replace a file atomically: a killed process leaves the old or the new text.

    Raises:
        RunError: the disk is full or read-only, or a permission is missing.
    """
    with replacing(path) as draft:
        draft.write_bytes(text.encode() if isinstance(text, str) else text)


def write_json(path: Path, content: Any, indent: int = 1, ascii: bool = True) -> None:
    """Like `write_text`, for a JSON file; see `to_json`."""
    write_text(path, to_json(content, indent=indent, ensure_ascii=ascii) + "\n")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Like `write_text`, with one JSON value per line."""
    write_text(path, "".join(f"{to_json(row)}\n" for row in rows))


def to_json(content: Any, **options: Any) -> str:
    """Return JSON that every reader takes: NaN and infinity, which JSON does not have, become null.

    Args:
        content: plain data.
        **options: of `json.dumps`.
    """
    return json.dumps(_finite(content), allow_nan=False, **options)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, if its file system can do that; some in user space cannot."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
