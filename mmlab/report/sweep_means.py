"""A sweep over seeds, summed up: mean and spread of each setting's metrics."""

import csv
import io
import math
from dataclasses import dataclass
from statistics import fmean, stdev

from mmlab.report.sweep_table import FIXED, Row, SweepTable, short

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
