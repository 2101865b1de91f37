"""The table of a sweep: a row for each point, the best first, and means over seeds; as CSV and as text."""

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mmlab.config.errors import ConfigError

# Columns of every table, after the swept keys.
FIXED = ("run", "status", "steps")
STATUS = ("complete", "failed", "missing")
SEED = "seed"
WIDEST = 44  # characters of a cell in the text


@dataclass(frozen=True)
class Row:
    """One point.

    Args:
        swept: the overrides that differ between points, key → value.
        run: the run's name.
        status: complete, failed or missing.
        metrics: the last metrics of a complete run, including `steps`.
    """

    swept: dict[str, str]
    run: str
    status: str
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The points that differ only in their seed.

    Attributes:
        swept: their other overrides, key → value.
        values: metric → its finite values in the complete runs.
    """

    swept: dict[str, str]
    values: dict[str, list[float]]

    def mean(self, metric: str) -> float | None:
        """The mean over the seeds, None without values."""
        values = self.values.get(metric)
        return fmean(values) if values else None

    def spread(self, metric: str) -> float | None:
        """The sample standard deviation over the seeds, None for fewer than two values."""
        values = self.values.get(metric, [])
        return stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class SweepTable:
    """All points of a sweep.

    Args:
        title: the sweep's name.
        metric: the metric by which rows are sorted.
        maximize: whether a higher metric is better.
        points: a row for each point, in any order.
    """

    title: str
    metric: str
    maximize: bool
    points: list[Row]

    @property
    def swept(self) -> list[str]:
        """The swept keys."""
        return list(dict.fromkeys(key for row in self.points for key in row.swept))

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, the sweep's own first."""
        names = dict.fromkeys([self.metric, *(name for row in self.points for name in row.metrics)])
        return [name for name in names if name not in FIXED]

    @property
    def header(self) -> list[str]:
        return [*self.swept, *FIXED, *self.metrics]

    @property
    def rows(self) -> list[Row]:
        """The points, best first; then those without a finite metric, failed ones, missing ones."""
        return sorted(self.points, key=lambda row: (STATUS.index(row.status), self._rank(self.value(row))))

    @property
    def settings(self) -> list[Setting]:
        """The settings, best mean first, those without a mean last; empty if no seed was swept."""
        if SEED not in self.swept:
            return []
        groups: dict[tuple[tuple[str, str], ...], list[Row]] = {}
        for row in self.points:
            groups.setdefault(tuple((k, v) for k, v in row.swept.items() if k != SEED), []).append(row)
        settings = [Setting(dict(swept), _finite_values(rows)) for swept, rows in groups.items()]
        return sorted(settings, key=lambda setting: self._rank(setting.mean(self.metric)))

    def value(self, row: Row) -> float | None:
        """The sweep's metric of a point, None if it is missing or not finite."""
        return _finite(row.metrics.get(self.metric))

    def cells(self, row: Row) -> list[Any]:
        """The values of a row under `header`; missing ones are empty."""
        swept = [row.swept.get(key, "") for key in self.swept]
        metrics = [row.metrics.get(name, "") for name in ("steps", *self.metrics)]
        return [*swept, row.run, row.status, *metrics]

    def csv(self) -> str:
        """The table in full precision."""
        return _csv([self.header, *map(self.cells, self.rows)])

    def grid(self) -> list[list[str]]:
        """Header and rows as short texts."""
        return [self.header, *([short(cell) for cell in self.cells(row)] for row in self.rows)]

    def text(self) -> str:
        """The table for a terminal, in aligned columns."""
        return aligned(self.grid())

    def means_csv(self) -> str:
        """A row for each setting, in full precision: its overrides, the number of runs, mean and spread per metric."""
        metrics = self._averaged
        lines: list[list[Any]] = [
            [*self._keys, "runs", *(f"{m} {what}" for m in metrics for what in ("mean", "spread"))]
        ]
        for setting in self.settings:
            numbers = [statistic(name) for name in metrics for statistic in (setting.mean, setting.spread)]
            lines.append([*self._beginning(setting), *("" if number is None else number for number in numbers)])
        return _csv(lines)

    def means_grid(self) -> list[list[str]]:
        """As `means_csv`, as short texts such as "0.912 ± 0.004"."""
        metrics = self._averaged
        lines = [[*self._keys, "runs", *metrics]]
        for setting in self.settings:
            cells = [_mean_and_spread(setting, name) for name in metrics]
            lines.append([*map(short, self._beginning(setting)), *cells])
        return lines

    def _rank(self, value: float | None) -> tuple[bool, float]:
        """A key that sorts better values first and None last."""
        return value is None, 0.0 if value is None else -value if self.maximize else value

    @property
    def _keys(self) -> list[str]:
        return [key for key in self.swept if key != SEED]

    @property
    def _averaged(self) -> list[str]:
        """The metrics with a mean, and the sweep's own."""
        settings = self.settings
        return [name for name in self.metrics if name == self.metric or any(name in s.values for s in settings)]

    def _beginning(self, setting: Setting) -> list[Any]:
        """The first cells of a setting: its overrides and its number of runs."""
        return [*(setting.swept.get(key, "") for key in self._keys), len(setting.values.get(self.metric, []))]


def read_sweep(file: Path, maximize: bool) -> SweepTable:
    """Read a table back that `SweepTable.csv` wrote as `<sweep>/table.csv`.

    Raises:
        ConfigError: it is no such table.
    """
    header, *lines = [*csv.reader(io.StringIO(file.read_text(encoding="utf-8", errors="replace")))] or [[]]
    first = header.index(FIXED[0]) if FIXED[0] in header else 0
    keys, metrics = header[:first], header[first + len(FIXED) :]
    whole = [dict(zip(header, line, strict=True)) for line in lines if len(line) == len(header)]
    if not metrics or header != [*keys, *FIXED, *metrics] or len(whole) < len(lines):
        raise ConfigError(f"{file} is not the table of a sweep; the sweep's command writes it again.")
    if unknown := {cells["status"] for cells in whole} - {*STATUS}:
        raise ConfigError(f"{file} has the status '{min(unknown)}'; the sweep's command writes it again.")
    rows = []
    for cells in whole:
        numbers = {name: _read(cells[name]) for name in ("steps", *metrics) if cells[name]}
        rows.append(Row({key: cells[key] for key in keys if cells[key]}, cells["run"], cells["status"], numbers))
    return SweepTable(file.parent.name, metrics[0], maximize, rows)


def _read(cell: str) -> Any:
    try:
        return float(cell) if "." in cell or "e" in cell or not cell.lstrip("-").isdigit() else int(cell)
    except ValueError:
        return cell


def aligned(lines: list[list[str]]) -> str:
    """Lines of cells as text in columns."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in padded)


def short(cell: Any) -> str:
    """A cell with few digits, shortened to `WIDEST`."""
    text = f"{cell:.5g}" if isinstance(cell, float) else str(cell)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"


def _csv(lines: Iterable[list[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def _mean_and_spread(setting: Setting, metric: str) -> str:
    mean, spread = setting.mean(metric), setting.spread(metric)
    if mean is None:
        return ""
    return f"{mean:.4g}" if spread is None else f"{mean:.4g} ± {spread:.2g}"


def _finite_values(rows: list[Row]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.metrics.items():
            if name not in FIXED and (number := _finite(value)) is not None:
                values.setdefault(name, []).append(number)
    return values


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
