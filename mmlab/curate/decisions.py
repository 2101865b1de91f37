"""What a person decided about descriptions: an append-only log, in which undoing is a line of its own."""

import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmlab.config.errors import RunError
from mmlab.curate.journal import Journal, Row, read_rows
from mmlab.curate.steps import DECISIONS, step_rows

ACTIONS = ("accept", "edit", "reject")
LONGEST = 20_000  # characters of an edited text


class Stale(Exception):
    """The decision was made on a state that has changed since: by another tab, or by another curation."""


class Unfit(Exception):
    """A decision that cannot be; its text is a sentence for the person."""


def standing(rows: Sequence[Row]) -> list[Row]:
    """The decisions that were not undone, in their order."""
    undone = {row["undoes"] for row in rows if row["action"] == "undo"}
    return [row for row in rows if row["action"] in ACTIONS and row["n"] not in undone]


def about(items: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The decisions that stand and are about an item's present text, in their order."""
    texts = {item["key"]: item["text"] for item in items}
    return [row for row in standing(rows) if texts.get(row["key"]) == row["before"]]


def decided(out: Path, items: Sequence[Row]) -> dict[str, Row]:
    """key → the decision that stands, for all items about whose present text there is one."""
    return {row["key"]: row for row in about(items, read_rows(out / DECISIONS))}


def kept_items(out: Path) -> list[Row]:
    """What no rule caught, in the order of the samples.

    Raises:
        RunError: the curation has not come as far as that.
    """
    described = read_rows(out / "described.jsonl")
    names = ("described", "continued", "repaired", "filtered")
    faults = sum("fault" in row for name in names[:3] for row in step_rows(out, name))
    filtered = step_rows(out, "filtered")
    if not described or len(filtered) + faults < described[0]["settings"]["chosen"]:
        raise RunError(
            f"{out} has nothing to review yet; run `mmlab curate minigpt4 out={out} …` until it asks for it."
        )
    return sorted((row for row in filtered if not row["caught"]), key=lambda row: row["sample"])


class Review:
    """Items and the decisions about them; threads may share it, one process has it at a time.

    Every change names the state that it was made on, so two tabs cannot overwrite each other: the second gets Stale.

    Args:
        out: folder of a curation.

    Attributes:
        items: the rows that are reviewed.
    """

    def __init__(self, out: Path):
        self.items = kept_items(out)
        self._place = {row["key"]: i for i, row in enumerate(self.items)}
        self._before = {row["key"]: row for row in step_rows(out, "continued")}
        self._journal = Journal(out / DECISIONS)
        self._lock = threading.Lock()
        self._stands = self._fold()

    def state(self) -> dict[str, Any]:
        """Counts, the last decision's number (0 for none), and each item's state in one letter: a, e, r or -."""
        with self._lock:
            letters = [self._letter(row) for row in self.items]
            names = {"accepted": "a", "edited": "e", "rejected": "r", "left": "-"}
            counts = {name: letters.count(letter) for name, letter in names.items()}
            mine = about(self.items, self._journal.rows)
            last = mine[-1]["n"] if mine else 0
            return {"total": len(self.items), "last": last, "letters": "".join(letters), **counts}

    def item(self, i: int) -> dict[str, Any]:
        """Item i with its decision: `seen` is the decision's number, which a new one has to name; 0 for none."""
        with self._lock:
            row = self.items[i]
            stands = self._stands.get(row["key"])
            action = stands["action"] if stands else None
            return {
                "i": i,
                "key": row["key"],
                "text": stands["text"] if action == "edit" and stands else row["text"],
                "proposed": row["text"],
                "described": self._before[row["key"]]["text"],
                "next": self.items[i + 1]["key"] if i + 1 < len(self.items) else None,
                "action": action,
                "seen": stands["n"] if stands else 0,
            }

    def decide(self, i: int, action: str, text: str, key: str, proposed: str, seen: int) -> None:
        """Write a decision down.

        Args:
            i: place of the item.
            action: one of `ACTIONS`.
            text: of an edit.
            key, proposed, seen: the item as the person saw it, as `item` gave it.

        Raises:
            Stale: the item is another one, has another text, or has another decision than was seen.
            Unfit: no such item or action, or an edit to nothing or to too much.
        """
        text = "\n".join(line.strip() for line in text.strip().splitlines())
        with self._lock:
            if not 0 <= i < len(self.items):
                raise Unfit(f"There is no description {i + 1}; reload this page.")
            row = self.items[i]
            stands = self._stands.get(row["key"])
            if (key, proposed, seen) != (row["key"], row["text"], stands["n"] if stands else 0):
                raise Stale
            if action not in ACTIONS:
                raise Unfit(f"'{action}' is none of {', '.join(ACTIONS)}.")
            if action == "edit" and not 0 < len(text) <= LONGEST:
                raise Unfit(f"An edited text has 1 to {LONGEST} characters; reject the description instead.")
            action = "accept" if action == "edit" and text == row["text"] else action
            after = {"text": text} if action == "edit" else {}
            self._write({"key": row["key"], "action": action, "before": row["text"], **after})

    def undo(self, last: int) -> int:
        """Take the last decision back and return its item.

        Raises:
            Stale: another one has been the last since, or there is none.
        """
        with self._lock:
            mine = about(self.items, self._journal.rows)
            if not mine or mine[-1]["n"] != last:
                raise Stale
            self._write({"action": "undo", "undoes": last})
            return self._place[mine[-1]["key"]]

    def _write(self, row: Row) -> None:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self._journal.append({"n": len(self._journal.rows) + 1, **row, "at": at})
        self._stands = self._fold()

    def _fold(self) -> dict[str, Row]:
        return {row["key"]: row for row in about(self.items, self._journal.rows)}

    def _letter(self, row: Row) -> str:
        stands = self._stands.get(row["key"])
        return stands["action"][0] if stands else "-"
