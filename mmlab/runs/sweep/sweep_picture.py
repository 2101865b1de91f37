"""A sweep as a figure: the metric over each swept key, and the tables; over seeds, the means first."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmlab.runs.disk import replacing, write_text
from mmlab.runs.sweep.sweep_table import SEED, SweepTable, aligned

GOOD, BAD = "tab:green", "tab:red"
PAGE, CARD, LINE, INK, FAINT = "0.95", "white", "0.85", "0.1", "0.6"  # gray levels
_POINT = "tab:blue"
_PANEL = (4.0, 3.0)  # inches
_ROW = 0.2  # inches
_MAX_PANELS, _MAX_ROWS, _COLUMNS = 6, 60, 3
_MAX_TICKS, _MAX_NAMES, _MAX_LABEL = 5, 20, 16  # numbers and names at an axis, characters of a name
_MIN_GAP = 0.12  # between labels of numbers, as a fraction of their range
_PATH = re.compile(r"[\w./-]+\w")


def write_sweep(table: SweepTable, folder: Path) -> None:
    """Write `table.csv`, `table.png` and, if seeds were swept, `means.csv` into a sweep's folder, each atomically."""
    write_text(folder / "table.csv", table.csv())
    if table.settings:
        write_text(folder / "means.csv", table.means_csv())
    with replacing(folder / "table.png", sync=False) as draft:
        # The tight box includes the title and the tables, which lie outside the figure.
        sweep_figure(table).savefig(draft, format="png", dpi=100, bbox_inches="tight", pad_inches=0.25)


def sweep_figure(table: SweepTable) -> Figure:
    """Draw a sweep.

    Returns:
        A figure without pyplot: a panel for each swept key once a point is complete, with the best point in green;
        above it the title and below it the tables, to be saved with a tight bounding box.
    """
    scored = any(table.value(row) is not None for row in table.points)
    # Seeds appear as a spread at each setting; they have an axis only if nothing else was swept.
    keys = [key for key in table.swept if key != SEED or table.swept == [SEED]][:_MAX_PANELS] if scored else []
    columns = min(_COLUMNS, len(keys)) or 1
    rows = math.ceil(len(keys) / columns)
    height = rows * _PANEL[1] or _ROW
    figure = Figure((columns * _PANEL[0], height), facecolor=PAGE, layout="constrained")
    figure.text(0, 1 + _ROW / height, table.title, size=16, color=INK, parse_math=False)
    for number, key in enumerate(keys, start=1):
        _panel(figure.add_subplot(rows, columns, number), table, key)
    for number, (line, color) in enumerate(_lines(table), start=1):
        stripe = {"facecolor": CARD if number % 2 else PAGE, "edgecolor": "none", "pad": 2.5}
        place, font = (0, -number * _ROW / height), {"size": 8.5, "family": "monospace"}
        figure.text(*place, line, color=color, va="top", bbox=stripe, parse_math=False, **font)
    return figure


def _panel(axes: Axes, table: SweepTable, key: str) -> None:
    axes.set_title(f"{table.metric} over {key}", loc="left", size=10, color=INK, parse_math=False)
    axes.set_facecolor(CARD)
    axes.spines[:].set_color(LINE)
    axes.tick_params(which="both", labelsize=8, labelcolor=FAINT, color=LINE)
    axes.grid(axis="y", color=PAGE)
    axes.set_axisbelow(True)
    points = [
        (row.swept[key], value) for row in table.rows if key in row.swept and (value := table.value(row)) is not None
    ]
    if not points:
        return
    bars = [
        (setting.swept[key], mean, spread)
        for setting in table.settings
        if key in setting.swept
        and (mean := setting.mean(table.metric)) is not None
        and (spread := setting.spread(table.metric)) is not None
    ]
    values = [value for _, value in points]
    if _spans_decades([*values, *(mean - spread for _, mean, spread in bars)]):
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    places = _x_axis(axes, [value for value, _ in points])
    x = [places[value] for value, _ in points]
    if bars:
        swept, means, spreads = zip(*bars, strict=True)
        style = {"fmt": "_", "markersize": 20, "markeredgewidth": 2, "color": INK, "ecolor": FAINT}
        axes.errorbar([places[value] for value in swept], means, spreads, **style)
    if table.swept == [key]:
        axes.plot(*zip(*sorted(zip(x, values, strict=True)), strict=True), color=LINE, zorder=1)
    axes.scatter(x, values, 20, _POINT, zorder=3)
    if key in table.rows[0].swept:
        axes.scatter(x[0], values[0], 60, GOOD, zorder=4)


def _x_axis(axes: Axes, values: Sequence[str]) -> dict[str, float]:
    """Scale and label the axis for swept values: numbers by size, anything else as sorted, evenly spaced names.

    Returns:
        Value → x.
    """
    numbers = {value: number for value in values if (number := _number(value)) is not None}
    if len(numbers) < len(set(values)):
        names = sorted(set(values))
        step = math.ceil(len(names) / _MAX_NAMES)
        labels = [name if len(name) <= _MAX_LABEL else f"{name[: _MAX_LABEL - 1]}…" for name in _brief(names)]
        turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if len("".join(labels)) > 40 else {}
        axes.set_xticks(range(0, len(names), step), labels[::step], parse_math=False, **turned)
        axes.set_xlim(-0.5, len(names) - 0.5)
        return {name: float(place) for place, name in enumerate(names)}
    ticks = sorted(set(numbers.values()))
    places = ticks
    if _spans_decades(ticks):
        axes.set_xscale("log")
        places = [math.log10(tick) for tick in ticks]
    # A few values are labeled themselves, unless their labels would overlap.
    gap = _MIN_GAP * (places[-1] - places[0])
    if len(ticks) <= _MAX_TICKS and all(right - left > gap for left, right in pairwise(places)):
        axes.set_xticks(ticks, [f"{tick:.4g}" for tick in ticks])
        axes.minorticks_off()
    return numbers


def _brief(names: list[str]) -> list[str]:
    """Shorten recipes and other paths to their last part, where that still tells them apart."""
    last = [name.rpartition("/")[2] for name in names]
    return last if all(map(_PATH.fullmatch, names)) and len(set(last)) == len(names) else names


def _spans_decades(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= 20


def _lines(table: SweepTable) -> list[tuple[str, str]]:
    """The lines below the panels with their colors: the best is green, a failed point red, a missing one faint."""
    lines: list[tuple[str, str]] = []
    if means := table.settings:
        colors = [INK] * len(means)
        if means[0].mean(table.metric) is not None:
            colors[0] = GOOD
        lines = [*_block(table.means_grid(), colors), ("", FAINT)]
    rows = table.rows[:_MAX_ROWS]
    colors = [{"failed": BAD, "missing": FAINT}.get(row.status, INK) for row in rows]
    if rows and table.value(rows[0]) is not None:
        colors[0] = GOOD
    lines += _block(table.grid()[: _MAX_ROWS + 1], colors)
    if (more := len(table.points) - _MAX_ROWS) > 0:
        lines.append((f"and {more} more, in table.csv", FAINT))
    return lines


def _block(grid: list[list[str]], colors: Sequence[str]) -> list[tuple[str, str]]:
    """The lines of a table, padded to one width, with the color of each; the header is faint."""
    lines = aligned(grid).split("\n")
    width = max(map(len, lines))
    return [(line.ljust(width), color) for line, color in zip(lines, [FAINT, *colors], strict=True)]


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
