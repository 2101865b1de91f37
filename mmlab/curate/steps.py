"""A curation as a folder: each step's rows in a journal that a killed process can go on with.

out/described.jsonl, continued.jsonl, repaired.jsonl, filtered.jsonl    one row per sample; the first: settings
out/answered.jsonl, parsed.jsonl, filtered.jsonl                        the same of LLaVA's data
out/replies/     what a language model answered       out/decisions.jsonl   what a person decided
out/shards/      what came of it                      out/report.json       how many at each step
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError
from mmlab.curate.journal import Journal, Row, by_key, read_rows
from mmlab.data.progress_bar import progress

Step = Callable[[Sequence[Row]], Iterable[Row]]
"""Rows in, rows out, each with the `key` of a sample; `text` is the description, `fault` says why there is none."""

STEPS = ("described", "continued", "repaired", "filtered")
DECISIONS = "decisions.jsonl"
SHARDS = "shards"
REPORT = "report.json"
DATA = "data.json"
EXCERPT = 60  # characters of a setting that an error shows


def run_step(
    out: Path,
    name: str,
    settings: dict[str, Any],
    step: Step,
    rows: Sequence[Row],
    block: int | None = None,
    quiet: bool = False,
) -> list[Row]:
    """Apply a step to the rows that its journal does not hold yet.

    Args:
        out: folder of the curation.
        name: of the step and its journal.
        settings: all that the step's rows depend on, those of the steps before it included.
        step: called with the rows that are left; each row it yields is on the disk before the next is made.
        rows: of the step before.
        block: call `step` with this many rows at a time, always the same ones, so that what is computed in batches
            does not depend on where an earlier process was killed; None: with all that are left.
        quiet: show no progress.

    Returns:
        One row for each row that came in without a fault, in their order; the step may have found one.

    Raises:
        ConfigError: the journal was made with other settings.
    """
    journal = settle(out, name, settings)
    done = by_key(journal.rows[1:])
    rows = [row for row in rows if "fault" not in row]
    left = sum(row["key"] not in done for row in rows)
    new = _left(step, rows, done, block)
    try:
        for row in progress(new, name, left, quiet or not left):
            journal.append(row)
            done[row["key"]] = row
    finally:
        journal.close()
    return [done[row["key"]] for row in rows]


def settle(out: Path, name: str, settings: dict[str, Any]) -> Journal:
    """A step's journal, which holds the settings from now on.

    Raises:
        ConfigError: it was made with others.
    """
    journal = Journal(journal_of(out, name))
    now = json.loads(json.dumps(settings))
    if not journal.rows:
        journal.append({"settings": now})
        journal.close()
        return journal
    before = journal.rows[0].get("settings", {})
    if differ := [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key)]:
        key, was, is_now = _difference(differ[0], before.get(differ[0]), now.get(differ[0]))
        raise ConfigError(
            f"{journal.path} was made with {key}={was}, not {is_now}; give another out=…, or remove that file and "
            "those of later steps to make them again."
        )
    return journal


def _left(step: Step, rows: Sequence[Row], done: dict[str, Row], block: int | None) -> Iterable[Row]:
    if block is None:
        left = [row for row in rows if row["key"] not in done]
        yield from step(left) if left else ()
        return
    for start in range(0, len(rows), block):
        some = rows[start : start + block]
        if any(row["key"] not in done for row in some):
            yield from (row for row in step(some) if row["key"] not in done)


def remove_litter(out: Path) -> None:
    """Remove what a killed process was writing; whoever calls it has the folder's lock."""
    for left in [*out.glob("*.tmp-*"), *out.glob("*.old-*"), *out.glob(".*.json.*")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def step_rows(out: Path, name: str) -> list[Row]:
    """The rows of a step so far, without its settings; another process may be writing them."""
    return read_rows(journal_of(out, name))[1:]


def journal_of(out: Path, name: str) -> Path:
    return out / f"{name}.jsonl"


def _difference(key: str, before: Any, now: Any) -> tuple[str, str, str]:
    """The first key, of nested ones `outer.inner`, whose values differ, and both values where they do."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                return _difference(f"{key}.{name}", before.get(name), now.get(name))
    texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in (before, now)]
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    return key, _excerpt(texts[0], same), _excerpt(texts[1], same)


def _excerpt(text: str, place: int) -> str:
    """A text, or where it is long what it says at a place and a little before."""
    if len(text) <= EXCERPT:
        return text
    start = max(0, place - EXCERPT // 4)
    end = start + EXCERPT
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"
