"""The table of a sweep: a row for each point, the best first; as CSV, as text and as a picture."""

import csv
import io
import math
from dataclasses import dataclass
from typing import Any

# Columns that every sweep has, behind what was swept.
FIXED = ("run", "status", "steps")
STATUS = ("complete", "failed", "missing")
WIDEST = 44


@dataclass(frozen=True)
class Row:
    """One point.

    Args:
        swept: its own overrides, key → value.
        run: the run's name.
        status: complete, failed or missing.
        metrics: what the complete run ended with, `steps` among it.
    """

    swept: dict[str, str]
    run: str
    status: str
    metrics: dict[str, Any]


@dataclass(frozen=True)
class SweepTable:
    """All points of a sweep.

    Args:
        title: the sweep's name.
        metric: the metric that rows are sorted by.
        maximize: whether more of it is better.
        points: a row for each point, in any order.
    """

    title: str
    metric: str
    maximize: bool
    points: list[Row]

    @property
    def swept(self) -> list[str]:
        """The keys that were swept."""
        return list(dict.fromkeys(key for row in self.points for key in row.swept))

    @property
    def metrics(self) -> list[str]:
        """The metrics' names, the one that counts first."""
        names = dict.fromkeys([self.metric, *(name for row in self.points for name in row.metrics)])
        return [name for name in names if name not in FIXED]

    @property
    def header(self) -> list[str]:
        return [*self.swept, *FIXED, *self.metrics]

    @property
    def rows(self) -> list[Row]:
        """The points, the best first; then those without a finite metric, failed ones, missing ones."""

        def rank(row: Row) -> tuple[int, bool, float]:
            value = self.value(row)
            key = 0.0 if value is None else -value if self.maximize else value
            return STATUS.index(row.status), value is None, key

        return sorted(self.points, key=rank)

    def value(self, row: Row) -> float | None:
        """A point's metric, None where it is missing or not finite."""
        value = row.metrics.get(self.metric)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def cells(self, row: Row) -> list[Any]:
        """The values of a row under `header`; what is not there is empty."""
        swept = [row.swept.get(key, "") for key in self.swept]
        metrics = [row.metrics.get(name, "") for name in ("steps", *self.metrics)]
        return [*swept, row.run, row.status, *metrics]

    def csv(self) -> str:
        """The table with all digits."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows(self.cells(row) for row in self.rows)
        return out.getvalue()

    def grid(self) -> list[list[str]]:
        """Header and rows as short texts."""
        return [self.header, *([short(cell) for cell in self.cells(row)] for row in self.rows)]

    def text(self) -> str:
        """The table for a terminal, in aligned columns."""
        return aligned(self.grid())


def aligned(lines: list[list[str]]) -> str:
    """Lines of cells as text in columns."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in padded)


def short(cell: Any) -> str:
    """A cell as it stands in a table to be read."""
    text = f"{cell:.5g}" if isinstance(cell, float) else str(cell)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"
