"""A person's decisions about descriptions: an append-only log, in which an undo is an entry of its own."""

import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmlab.config.errors import RunError
from mmlab.curate.journal import DECISIONS, Journal, Row, journal_of, read_rows, step_rows

ACTIONS = ("accept", "edit", "reject")
LONGEST = 20_000  # characters of an edited text


class Stale(Exception):
    """The state has changed since the person saw it, through another tab or another curation."""


class Unfit(Exception):
    """An invalid decision; its text is a sentence for the person."""


def valid_decisions(items: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The decisions that were not undone and concern an item's current text, in order."""
    texts = {item["key"]: item["text"] for item in items}
    undone = {row["undoes"] for row in rows if row["action"] == "undo"}
    decisions = [row for row in rows if row["action"] in ACTIONS and row["n"] not in undone]
    return [row for row in decisions if texts.get(row["key"]) == row["before"]]


def decided(out: Path, items: Sequence[Row]) -> dict[str, Row]:
    """key → the valid decision, for all items that have one."""
    return {row["key"]: row for row in valid_decisions(items, read_rows(out / DECISIONS))}


def items_to_review(out: Path) -> list[Row]:
    """The descriptions that no rule caught, in the order of the samples.

    Raises:
        RunError: the filter has not finished.
    """
    described = read_rows(journal_of(out, "described"))
    faults = sum("fault" in row for name in ("described", "continued", "repaired") for row in step_rows(out, name))
    filtered = step_rows(out, "filtered")
    if not described or len(filtered) + faults < described[0]["settings"]["chosen"]:
        raise RunError(
            f"{out} has nothing to review yet; run `mmlab curate minigpt4 out={out} …` until it asks for the review."
        )
    return sorted((row for row in filtered if not row["caught"]), key=lambda row: row["sample"])


class Review:
    """Items and the decisions about them, of one process; threads may share it.

    Every change names the state that the person saw, so that two tabs cannot overwrite each other: the second one gets
    Stale.

    Args:
        out: folder of a curation.

    Attributes:
        items: the rows to review.
    """

    def __init__(self, out: Path):
        self.items = items_to_review(out)
        self._place = {row["key"]: i for i, row in enumerate(self.items)}
        self._before = {row["key"]: row for row in step_rows(out, "continued")}
        self._journal = Journal(out / DECISIONS)
        self._lock = threading.Lock()
        self._decisions = self._current()

    def state(self) -> dict[str, Any]:
        """Counts, the last decision's number (0 for none), and a letter per item: a, e, r or -."""
        with self._lock:
            letters = [self._letter(row) for row in self.items]
            names = {"accepted": "a", "edited": "e", "rejected": "r", "left": "-"}
            counts = {name: letters.count(letter) for name, letter in names.items()}
            decisions = valid_decisions(self.items, self._journal.rows)
            last = decisions[-1]["n"] if decisions else 0
            return {"total": len(self.items), "last": last, "letters": "".join(letters), **counts}

    def item(self, i: int) -> dict[str, Any]:
        """Item i with its decision, whose number `seen` (0 for none) a new decision has to name."""
        with self._lock:
            row = self.items[i]
            decision = self._decisions.get(row["key"])
            action = decision["action"] if decision else None
            return {
                "i": i,
                "key": row["key"],
                "text": decision["text"] if action == "edit" and decision else row["text"],
                "proposed": row["text"],
                "described": self._before[row["key"]]["text"],
                "next": self.items[i + 1]["key"] if i + 1 < len(self.items) else None,
                "action": action,
                "seen": decision["n"] if decision else 0,
            }

    def decide(self, i: int, action: str, text: str, key: str, proposed: str, seen: int) -> None:
        """Record a decision.

        Args:
            i: place of the item.
            action: one of `ACTIONS`.
            text: of an edit.
            key, proposed, seen: the item as the person saw it, from `item`.

        Raises:
            Stale: the item, its text or its decision is not what the person saw.
            Unfit: no such item or action, or an edited text that is empty or too long.
        """
        text = "\n".join(line.strip() for line in text.strip().splitlines())
        with self._lock:
            if not 0 <= i < len(self.items):
                raise Unfit(f"There is no description {i + 1}; reload the page.")
            row = self.items[i]
            decision = self._decisions.get(row["key"])
            if (key, proposed, seen) != (row["key"], row["text"], decision["n"] if decision else 0):
                raise Stale
            if action not in ACTIONS:
                raise Unfit(f"The action must be one of {', '.join(ACTIONS)}, not '{action}'.")
            if action == "edit" and not 0 < len(text) <= LONGEST:
                raise Unfit(f"An edited text must have 1 to {LONGEST} characters; reject the description instead.")
            action = "accept" if action == "edit" and text == row["text"] else action
            after = {"text": text} if action == "edit" else {}
            self._write({"key": row["key"], "action": action, "before": row["text"], **after})

    def undo(self, last: int) -> int:
        """Undo the last decision and return the place of its item.

        Raises:
            Stale: `last` is not the number of the last decision.
        """
        with self._lock:
            decisions = valid_decisions(self.items, self._journal.rows)
            if not decisions or decisions[-1]["n"] != last:
                raise Stale
            self._write({"action": "undo", "undoes": last})
            return self._place[decisions[-1]["key"]]

    def _write(self, row: Row) -> None:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self._journal.append({"n": len(self._journal.rows) + 1, **row, "at": at})
        self._decisions = self._current()

    def _current(self) -> dict[str, Row]:
        return {row["key"]: row for row in valid_decisions(self.items, self._journal.rows)}

    def _letter(self, row: Row) -> str:
        decision = self._decisions.get(row["key"])
        return decision["action"][0] if decision else "-"
