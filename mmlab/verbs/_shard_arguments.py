"""The parser of `mmlab shards`, and the types of its arguments."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, existing_file, existing_folder, nearest


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence that names the closest option."""

    def __init__(self, **options):
        super().__init__(formatter_class=partial(argparse.HelpFormatter, max_help_position=28), **options)

    def error(self, message: str):
        raise ConfigError(f"{message}; see `{self.prog} --help`.")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            options = [str(choice) for choice in action.choices]
            raise ConfigError(f"'{value}' is not one of {', '.join(options)}.{nearest(str(value), options)}")


def add(commands, name: str, run: Callable[[argparse.Namespace], None], summary: str) -> argparse.ArgumentParser:
    """Add a command that `run` executes, given the parsed arguments."""
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=run, parser=parser)
    return parser


def positive(text: str) -> int:
    """The type of an argument that is a count: 1, 2, …"""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be a whole number of at least 1, not {text}")
    return int(text)


def share(text: str) -> float:
    """The type of an argument that is a share: 0 to 1."""
    try:
        if 0 <= (number := float(text)) <= 1:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"it must be a share from 0 to 1, not {text}")


def part_of(text: str) -> tuple[int, int]:
    """The type of an argument that is one of several parts: `3/64`."""
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise argparse.ArgumentTypeError(f"it is the number of a part, from 1, such as 3/64, not {text}")


def held_out(text: str) -> tuple[str, float]:
    """The type of an argument that is a split with its share: `val=0.05`."""
    name, _, number = text.partition("=")
    try:
        if name.isidentifier() and 0 < (part := float(number)) < 1:
            return name, part
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"it is a name and a share between 0 and 1, such as val=0.05, not {text}")


def mapping(text: str) -> dict[str, str]:
    """The type of an argument that maps names to names: `image=input.jpg,text=output.txt`."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(name and value for name, _, value in pairs):
        raise argparse.ArgumentTypeError(f"it is name=member,…, such as image=input.jpg,text=output.txt, not {text}")
    return {name: value for name, _, value in pairs}


def existing(path: str) -> str:
    """The type of an argument that is a path; ConfigError with the closest name if it does not exist."""
    place = Path(path).expanduser()
    if ":" in path or place.exists():  # a URL or a command is refused where folders are opened
        return path
    siblings = [str(other) for other in place.parent.iterdir()] if place.parent.is_dir() else []
    raise ConfigError(f"there is no {path}.{nearest(str(place), siblings)}")


def folder(path: str) -> str:
    """The type of an argument that is a folder; ConfigError if it does not exist, or is a file."""
    return str(existing_folder(path, ConfigError))


def file(path: str) -> str:
    """The type of an argument that is a file; ConfigError if it does not exist, or is a folder."""
    return str(existing_file(path, ConfigError))
