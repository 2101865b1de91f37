"""A curation as a folder that survives a kill: each step appends its rows to a journal, one by one.

out/described.jsonl, continued.jsonl, repaired.jsonl, filtered.jsonl    MiniGPT-4: the settings, then a row per sample
out/answered.jsonl, parsed.jsonl, filtered.jsonl                        LLaVA: the same, with a row per question
out/replies/     replies of the language model        out/decisions.jsonl   a person's decisions
out/shards/      the result                           out/report.json       counts of every step

A row is on disk when `append` returns. A process that is killed while it writes leaves at most one torn line, which
the next writer cuts off.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from mmlab.config.errors import ConfigError, DataError, RunError
from mmlab.data.progress_bar import progress
from mmlab.runs import disk
from mmlab.runs.disk import to_json

Row = dict[str, Any]
Step = Callable[[Sequence[Row]], Iterable[Row]]
"""Rows in, rows out, each with a `key`; a row with a `fault`, its reason, goes no further."""

DECISIONS = "decisions.jsonl"
SHARDS = "shards"
REPORT = "report.json"
EXCERPT = 60  # characters of a setting that an error shows


class Journal:
    """An append-only file of JSON lines with one writer; threads may share it.

    Args:
        path: the file, created with the first row.

    Attributes:
        rows: all rows, in order.

    Raises:
        DataError: a line in the middle is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows, self._size = _whole_rows(path)
        self._lock = threading.Lock()
        self._fd: int | None = None

    def append(self, row: Row) -> None:
        """Write a row and wait until it is on disk.

        Raises:
            RunError: the disk is full; earlier rows are unaffected.
        """
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self._lock:
            if self._fd is None:
                self._fd = self._open()
            try:
                with disk.writing(self.path):
                    written = 0
                    while written < len(line):
                        written += os.write(self._fd, line[written:])
                    os.fsync(self._fd)
            except (OSError, RunError):
                with suppress(OSError):
                    os.ftruncate(self._fd, self._size)
                raise
            self._size += len(line)
            self.rows.append(row)

    def _open(self) -> int:
        with disk.writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(fd, self._size)
            disk.sync_folder(self.path.parent)
        return fd

    def close(self) -> None:
        """Close the file; the next row opens it again."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None


class Steps:
    """The steps of a curation, each with a journal in one folder.

    A journal begins with all settings that its rows depend on: those of its own step and of the steps before it.

    Args:
        out: the folder.
        rows: of the first step.
        settings: of the first step.
        quiet: show no progress.
    """

    def __init__(self, out: Path, rows: Sequence[Row], settings: Row, quiet: bool = False):
        self.out = out
        self.rows = list(rows)
        self.settings = dict(settings)
        self.quiet = quiet

    def run(self, name: str, step: Step, block: int | None = None, **settings: Any) -> list[Row]:
        """Apply a step to the rows that its journal does not have yet, and return one row per row without a fault.

        Args:
            name: of the step and its journal.
            step: called with the remaining rows; each row it yields is on disk before the next one is computed.
            block: call `step` with this many rows at a time, always the same ones, so that what is computed in batches
                does not depend on where an earlier process was killed; None: with all remaining rows.
            **settings: that this step adds.

        Raises:
            ConfigError: the journal was written with other settings.
        """
        self.settings |= settings
        journal = open_journal(self.out, name, self.settings)
        done = by_key(journal.rows[1:])
        rows = [row for row in self.rows if "fault" not in row]
        missing = sum(row["key"] not in done for row in rows)
        with closing(journal):
            for row in progress(_new_rows(step, rows, done, block), name, missing, self.quiet or not missing):
                journal.append(row)
                done[row["key"]] = row
        self.rows = [done[row["key"]] for row in rows]
        return self.rows


def _new_rows(step: Step, rows: Sequence[Row], done: dict[str, Row], block: int | None) -> Iterator[Row]:
    if block is None:
        missing = [row for row in rows if row["key"] not in done]
        yield from step(missing) if missing else ()
        return
    for start in range(0, len(rows), block):
        batch = rows[start : start + block]
        if any(row["key"] not in done for row in batch):
            yield from (row for row in step(batch) if row["key"] not in done)


def open_journal(out: Path, name: str, settings: Row) -> Journal:
    """Open a step's journal, which records the settings if it is new.

    Raises:
        ConfigError: it was written with other settings.
    """
    journal = Journal(journal_of(out, name))
    now = json.loads(to_json(settings))
    if not journal.rows:
        with closing(journal):
            journal.append({"settings": now})
        return journal
    before = journal.rows[0].get("settings", {})
    if differ := [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key)]:
        key, was, is_now = _difference(differ[0], before.get(differ[0]), now.get(differ[0]))
        raise ConfigError(
            f"{journal.path} was written with {key}={was}, not {is_now}; use another out=…, or remove this file and "
            "those of later steps to redo them."
        )
    return journal


def journal_of(out: Path, name: str) -> Path:
    return out / f"{name}.jsonl"


def step_rows(out: Path, name: str) -> list[Row]:
    """The rows of a step so far, without its settings; another process may be writing them."""
    return read_rows(journal_of(out, name))[1:]


def read_rows(path: Path) -> list[Row]:
    """The rows of a journal that another process may be writing; nothing is changed.

    Raises:
        DataError: a line in the middle is damaged.
    """
    return _whole_rows(path)[0]


def _whole_rows(path: Path) -> tuple[list[Row], int]:
    """The rows and their size in bytes, without a torn last line."""
    data = path.read_bytes() if path.exists() else b""
    lines = data.split(b"\n")
    rows, size = [], 0
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError
        except ValueError:
            if number == len(lines) - 1:
                break  # after a power failure, the last line may be complete but contain other bytes
            raise DataError(
                f"{path}, line {number}, is damaged; truncate the file before that line, and the next command "
                "redoes the rest."
            ) from None
        rows.append(row)
        size += len(line) + 1
    return rows, size


def by_key(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows by their `key`; the first row of a key counts."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["key"], row)
    return first


def claim(path: Path, doing: str) -> TextIO:
    """Lock `path` until the returned file is closed or the process ends, in whatever way.

    Args:
        path: a lock file.
        doing: what the owner of the lock does, for the error, such as "curates into".

    Raises:
        ConfigError: a file is in the folder's place.
        RunError: another process has the lock.
    """
    disk.no_file(path.parent)
    return disk.claim(path, doing)


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Keep other curations out of a folder, and remove what a killed one was writing there.

    Raises:
        ConfigError: a file is in the folder's place.
        RunError: another process curates into it.
    """
    with closing(claim(out / ".lock", "curates into")):
        for path in [*out.glob("*.tmp-*"), *out.glob("*.old-*"), *out.glob(f"{disk.DRAFT}*")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        yield


def _difference(key: str, before: Any, now: Any) -> tuple[str, str, str]:
    """The first differing key (`outer.inner` if nested), and excerpts of both values around the first difference."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                return _difference(f"{key}.{name}", before.get(name), now.get(name))
    texts = [value if isinstance(value, str) else to_json(value, ensure_ascii=False) for value in (before, now)]
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    return key, _excerpt(texts[0], same), _excerpt(texts[1], same)


def _excerpt(text: str, place: int) -> str:
    """A text, shortened to the surroundings of a place if it is long."""
    if len(text) <= EXCERPT:
        return text
    start = max(0, place - EXCERPT // 4)
    end = start + EXCERPT
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"
