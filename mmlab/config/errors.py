"""Errors that the user can act on: one sentence and an exit code, no traceback."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class UserError(Exception):
    """A mistake by the user or a fault in the data, printed as one sentence without a traceback."""

    exit_code = 1


class RunError(UserError):
    """A run that failed (exit code 1)."""


class DataError(RunError):
    """Shards that are missing, damaged or unsuitable for the run (exit code 1)."""


class ConfigError(UserError):
    """An invalid config, detected before anything is built (exit code 2)."""

    exit_code = 2


def nearest(name: str, options: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the option closest to `name`, or an empty string if none is close."""
    close = closest(name, options)
    return f" Did you mean '{close}'?" if close else ""


def closest(name: str, options: Iterable[str]) -> str | None:
    """Return the option with the spelling closest to `name`, None if none is close."""
    return next(iter(get_close_matches(name, list(options), n=1, cutoff=0.5)), None)


def existing_file(path: str | Path, error: type[UserError] = DataError) -> Path:
    """Return the path of a file; raise `error` with the closest name if there is none, or if it is a folder."""
    file = Path(path).expanduser()
    if "://" in str(path):
        raise error(f"{path} is an address; give a local file.")
    if os.path.isdir(file):
        names = sorted(other.name for other in file.iterdir() if other.is_file())[:3]
        raise error(f"{path} is a folder; give a file{', such as ' + ', '.join(names) + ' in it' if names else ''}.")
    if not os.path.isfile(file):  # unlike Path's, false for a name that is too long
        raise error(f"there is no file {path}.{_sibling(file)}")
    return file


def existing_folder(path: str | Path, error: type[UserError] = DataError) -> Path:
    """Return the path of a folder; raise `error` with the closest name if there is none, or if it is a file."""
    folder = Path(path).expanduser()
    if "://" in str(path):
        raise error(f"{path} is an address; give a local folder.")
    if os.path.isfile(folder):
        raise error(f"{path} is a file; give a folder.")
    if not os.path.isdir(folder):
        raise error(f"there is no folder {path}.{_sibling(folder)}")
    return folder


def _sibling(path: Path) -> str:
    """A question about the name in the same folder that is closest to a path that does not exist."""
    return nearest(path.name, [other.name for other in path.parent.iterdir()] if os.path.isdir(path.parent) else [])
