"""The table of a sweep: a row for each point, the best first; as CSV, as text and as a picture."""

import csv
import io
import math
from dataclasses import dataclass
from statistics import fmean, stdev
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


SEED = "seed"


@dataclass(frozen=True)
class Setting:
    """The points that differ in their seed alone.

    Attributes:
        swept: their other overrides, key → value.
        values: of each metric, those of the complete points that have a finite one.
    """

    swept: dict[str, str]
    values: dict[str, list[float]]

    def mean(self, metric: str) -> float | None:
        """The mean over the seeds, None where no point has the metric."""
        return fmean(found) if (found := self.values.get(metric)) else None

    def spread(self, metric: str) -> float | None:
        """The standard deviation over the seeds (of a sample), None for fewer than two."""
        found = self.values.get(metric, [])
        return stdev(found) if len(found) > 1 else None


def settings(table: SweepTable) -> list[Setting]:
    """The settings of a sweep, the best mean first and those without one last; none where no seed was swept."""
    if SEED not in table.swept:
        return []
    groups: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in table.points:
        groups.setdefault(tuple((k, v) for k, v in row.swept.items() if k != SEED), []).append(row)
    found = [Setting(dict(swept), _values(table, rows)) for swept, rows in groups.items()]

    def rank(setting: Setting) -> tuple[bool, float]:
        mean = setting.mean(table.metric)
        return mean is None, 0.0 if mean is None else -mean if table.maximize else mean

    return sorted(found, key=rank)


def means_csv(table: SweepTable) -> str:
    """A row for each setting, with all digits: its overrides, how many runs, and mean and spread of every metric."""
    found = settings(table)
    keys, metrics = _keys(table), _metrics(table, found)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*keys, "runs", *(f"{name} {what}" for name in metrics for what in ("mean", "spread"))])
    for setting in found:
        numbers = [f(name) for name in metrics for f in (setting.mean, setting.spread)]
        writer.writerow([*_swept(setting, keys), _runs(setting, table), *("" if n is None else n for n in numbers)])
    return out.getvalue()


def means_grid(table: SweepTable) -> list[list[str]]:
    """Header and rows as short texts: "0.912 ± 0.004"."""
    found = settings(table)
    keys, metrics = _keys(table), _metrics(table, found)
    lines = [[*keys, "runs", *metrics]]
    for setting in found:
        cells = [_both(setting, name) for name in metrics]
        lines.append([*map(short, _swept(setting, keys)), str(_runs(setting, table)), *cells])
    return lines


def _keys(table: SweepTable) -> list[str]:
    return [key for key in table.swept if key != SEED]


def _metrics(table: SweepTable, found: list[Setting]) -> list[str]:
    """The metrics that are numbers, the one that counts first."""
    return [name for name in table.metrics if name == table.metric or any(name in s.values for s in found)]


def _swept(setting: Setting, keys: list[str]) -> list[str]:
    return [setting.swept.get(key, "") for key in keys]


def _runs(setting: Setting, table: SweepTable) -> int:
    return len(setting.values.get(table.metric, []))


def _both(setting: Setting, metric: str) -> str:
    mean, spread = setting.mean(metric), setting.spread(metric)
    if mean is None:
        return ""
    return f"{mean:.4g}" if spread is None else f"{mean:.4g} ± {spread:.2g}"


def _values(table: SweepTable, rows: list[Row]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.metrics.items():
            if name not in FIXED and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append(float(value))
    return found
