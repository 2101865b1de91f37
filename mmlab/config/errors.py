"""Errors that the user can act on: one sentence and an exit code, no traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


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
