"""Errors written for the person who reads them: one sentence, an exit code, no traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake of the user's or a fault of the data: printed as one sentence, without a traceback."""

    exit_code = 1


class RunError(UserError):
    """A run that could not go on (exit code 1)."""


class DataError(RunError):
    """Shards that are missing, broken or not what the run needs (exit code 1)."""


class ConfigError(UserError):
    """A config that cannot run, found before anything is built (exit code 2)."""

    exit_code = 2


def nearest(name: str, options: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the option closest to `name`, or an empty string."""
    close = closest(name, options)
    return f" Did you mean '{close}'?" if close else ""


def closest(name: str, options: Iterable[str]) -> str | None:
    """Return the option that is written most like `name`, or None where none is much like it."""
    return next(iter(get_close_matches(name, list(options), n=1, cutoff=0.5)), None)
