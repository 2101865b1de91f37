"""Progress of long work: a bar on a terminal, occasional plain lines anywhere else."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from tqdm import tqdm

_LINE_EVERY = 15.0

S = TypeVar("S")
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


def in_processes(
    work: Callable[[S], T], items: Sequence[S], label: str, workers: int = 1, quiet: bool = False
) -> Iterator[T]:
    """Yield `work(item)` of each item in order, with progress; `workers` spawned processes share the work."""
    if workers <= 1 or len(items) <= 1:
        yield from progress(map(work, items), label, len(items), quiet)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from progress(pool.map(work, items), label, len(items), quiet)


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
