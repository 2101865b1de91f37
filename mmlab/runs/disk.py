"""Locks, atomic writes and checks of files and folders."""

import fcntl
import os
import platform
from pathlib import Path
from typing import TextIO

from mmlab.config.errors import ConfigError, RunError


def claim(path: Path, doing: str) -> TextIO:
    """Lock a file until the returned file is closed or the process ends.

    On a file system without locks every claim succeeds.

    Args:
        path: the lock file, created if missing; the owner's process id and machine are written into it.
        doing: what the owner does with the file's folder, for the error, such as "is training".

    Raises:
        RunError: another process holds the lock.
    """
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
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def no_file(folder: Path) -> Path:
    """Return an output folder, existing or not.

    Raises:
        ConfigError: the path is a file.
    """
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; give a folder as out=…")
    return folder


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: a killed process leaves the old or the new text."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
