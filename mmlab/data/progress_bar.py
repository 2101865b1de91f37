"""Progress of long work: a bar on a terminal, occasional plain lines anywhere else."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

_LINE_EVERY = 15.0

T = TypeVar("T")


def progress(items: Iterable[T], label: str, total: int | None = None, quiet: bool = False) -> Iterator[T]:
    """Yield `items` and show their count on stderr.

    Args:
        items: to iterate over.
        label: of the work, such as "writing samples".
        total: number of items; None if unknown.
        quiet: show nothing.
    """
    if quiet:
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total, leave=False)
    else:
        yield from _lines(items, label, total)


def _lines(items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    """Print a line every quarter of a minute, so that a log shows progress and speed."""
    start = last = time.monotonic()
    of = f" of {total}" if total is not None else ""
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= _LINE_EVERY:
            last = now
            print(f"{label}: {count}{of} after {now - start:.0f} s", file=sys.stderr, flush=True)
