"""What the commands of `mmlab shards` share: a parser that complains in one sentence, and common arguments."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, nearest


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one sentence with the nearest right word."""

    def __init__(self, **options):
        super().__init__(formatter_class=partial(argparse.HelpFormatter, max_help_position=28), **options)

    def error(self, message: str):
        raise ConfigError(f"{message}; see `{self.prog} --help`.")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            options = [str(choice) for choice in action.choices]
            raise ConfigError(f"'{value}' is none of {', '.join(options)}.{nearest(str(value), options)}")


def add(commands, name: str, run, summary: str) -> argparse.ArgumentParser:
    """Add a command that `run` carries out, given the parsed arguments."""
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=run, parser=parser)
    return parser


def positive(text: str) -> int:
    """The type of an option that counts something: 1, 2, …"""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be a whole number of at least 1, not {text}")
    return int(text)


def existing(path: str) -> str:
    """Return the path of something that exists, or raise ConfigError with the nearest name beside it."""
    place = Path(path).expanduser()
    if ":" in path or place.exists():  # a URL or a command is refused where folders are opened
        return path
    siblings = [str(other) for other in place.parent.iterdir()] if place.parent.is_dir() else []
    raise ConfigError(f"there is no {path}.{nearest(str(place), siblings)}")


def add_kinds(parser: argparse.ArgumentParser) -> None:
    """Add `--kinds`: shapes to draw."""
    kinds = ("circle", "square", "triangle", "diamond", "star", "cross")
    parser.add_argument("--kinds", nargs="+", default=kinds, metavar="SHAPE", help=f"({' '.join(kinds)})")
