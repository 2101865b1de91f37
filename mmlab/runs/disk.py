"""What several layers ask of the file system."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from mmlab.config.errors import ConfigError, RunError


def claim(path: Path, name: str, taken: Callable[[str], str]) -> TextIO:
    """Make this process the only one that does what `path` stands for, until the returned file is closed.

    The system's lock ends with the process, in whatever way; a file system without locks grants every claim.

    Args:
        path: a lock file, which is made.
        name: what others are told of who has it.
        taken: the error's sentence, of who has the lock.

    Raises:
        RunError: another process has it.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read().strip() or "another process"
        file.close()
        raise RunError(taken(who)) from None
    except OSError:
        return file
    file.truncate(0)
    file.write(name)
    file.flush()
    return file


def no_file(folder: Path) -> Path:
    """A folder to write to, there or not; ConfigError where a file is in its place."""
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; give a folder as out=…")
    return folder


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
