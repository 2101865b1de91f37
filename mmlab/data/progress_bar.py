"""Progress of long work: a bar on a terminal, occasional plain lines anywhere else."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TypeVar

from tqdm import tqdm

from mmlab.config.errors import RunError

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
    """Yield `work(item)` of each item in order, with progress; `workers` spawned processes share the work.

    Raises:
        RunError: a process was killed; and whatever `work` raises.
    """
    if workers <= 1 or len(items) <= 1:
        yield from progress(map(work, items), label, len(items), quiet)
        return
    processes = min(workers, len(items))
    try:
        with ProcessPoolExecutor(processes, get_context("spawn"), _end_with_parent) as pool:
            yield from progress(pool.map(work, items), label, len(items), quiet)
    except BrokenProcessPool:
        raise RunError(
            f"one of {processes} processes was killed while {label}, perhaps because memory ran out; run it again with"
            " fewer --workers."
        ) from None


def _end_with_parent() -> None:
    """End this process when the one that started it is killed; it would wait for work forever."""

    def watch() -> None:
        parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
