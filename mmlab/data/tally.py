"""The rows of a data set that is converted: each is written, or left out and counted under a name."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmlab.data.bad_samples import sample_errors
from mmlab.data.sample_types import SampleError
from mmlab.runs.terminal import escaped


class Tally:
    """Counts of a converter; `rows = written + the sum of left_out` by construction.

    Attributes:
        written: rows that became a sample.
        left_out: rows that did not, by reason.
        examples: reason → where its first row is, and what is wrong with it.
        details: further counts, such as of boxes; they are no rows.
        distinct: name of a count → the different values that were counted, such as classes.
        lost: rows whose image is missing or unsupported: where, and what is wrong.
    """

    def __init__(self, *details: str):
        """
        Args:
            details: names of further counts, in the order in which they are printed.
        """
        self.written = 0
        self.left_out: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.details: Counter[str] = Counter(dict.fromkeys(details, 0))
        self.distinct: dict[str, set[str]] = {}
        self.lost: list[str] = []

    @property
    def rows(self) -> int:
        """Rows that were read."""
        return self.written + self.left_out.total()

    @contextmanager
    def row(self, where: str) -> Iterator[None]:
        """Around reading and yielding one row: whatever its content raises leaves it out, see `sample_errors`.

        Args:
            where: the row's file and place.
        """
        try:
            with sample_errors():
                yield
        except SampleError as error:
            self.leave_out(error.reason, f"{where}: {error}")
        else:
            self.written += 1

    def leave_out(self, reason: str, example: str) -> None:
        """Count a row that is not written."""
        self.left_out[reason] += 1
        self.examples.setdefault(reason, example)

    def note(self, name: str, value: str) -> None:
        """Count the different values under a name."""
        self.distinct.setdefault(name, set()).add(value)
        self.details[name] = len(self.distinct[name])

    def add(self, other: "Tally") -> None:
        """Count what another tally counted."""
        self.written += other.written
        self.left_out += other.left_out
        self.lost += other.lost
        for reason, example in other.examples.items():
            self.examples.setdefault(reason, example)
        for name, number in other.details.items():
            self.details[name] += 0 if name in other.distinct else number
        for name, values in other.distinct.items():
            self.distinct.setdefault(name, set()).update(values)
            self.details[name] = len(self.distinct[name])

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data, for `from_json`."""
        return {**vars(self), "distinct": {name: sorted(values) for name, values in self.distinct.items()}}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Tally":
        """The tally of which `content` is the plain data."""
        tally = cls()
        for name, value in content.items():
            setattr(tally, name, Counter(value) if name in ("left_out", "details") else value)
        tally.distinct = {name: set(values) for name, values in tally.distinct.items()}
        return tally

    def counts(self) -> dict[str, int]:
        """All counts by name; those of reasons add up with `samples` to `rows`."""
        left_out = {reason: self.left_out[reason] for reason in sorted(self.left_out)}
        return {"rows": self.rows, "samples": self.written, **left_out, **self.details}

    def lines(self) -> list[str]:
        """One line for each reason, with its first row and without control characters."""
        lines = [
            f"{reason} {number}, such as {self.examples[reason]}" for reason, number in sorted(self.left_out.items())
        ]
        return [escaped(line).replace("\n", "\\n").replace("\t", "\\t") for line in lines]
