"""The rows of a data set that is converted: each is written, or left out and counted under a name."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

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
