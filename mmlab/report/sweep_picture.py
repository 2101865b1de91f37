"""A sweep as a picture: the metric against each swept value, and the table below; over seeds, their means first."""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from mmlab.report.sheet import BAD, CARD, FAINT, GOOD, INK, LINE, PAGE, font
from mmlab.report.sweep_means import SEED, Setting, means_csv, means_grid, settings
from mmlab.report.sweep_table import Row, SweepTable

_POINT = "#3366cc"
_MARGIN, _PANEL, _GAP, _ROW = 24, (400, 300), 16, 24
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 20, 36, 44  # around a panel's axes
_MOST_PANELS, _MOST_ROWS = 6, 60
_ACROSS = 3
_PATH = re.compile(r"[\w./-]+\w")


_Block = tuple[list[list[str]], list[Row | Setting | None]]
"""A table: its lines, and what each of them is about."""


@dataclass(frozen=True)
class Axis:
    """Where values lie between 0 and 1, and which of them are written beside the axis."""

    place: Callable[[str | float], float]
    ticks: list[tuple[float, str]]


def write_sweep(table: SweepTable, folder: Path) -> None:
    """Write `table.csv`, `table.png` and, over seeds, `means.csv` into a sweep's folder; none is ever half there."""
    draft = folder / f".table.{os.getpid()}"
    texts = {"table.csv": table.csv()} | ({"means.csv": means_csv(table)} if settings(table) else {})
    for name, text in texts.items():
        draft.write_text(text, encoding="utf-8")
        draft.replace(folder / name)
    sweep_picture(table).save(draft, format="PNG")
    draft.replace(folder / "table.png")


def sweep_picture(table: SweepTable) -> Image.Image:
    """Draw a sweep.

    Returns:
        An RGB image: a panel for each swept key once a point is complete, the best point in green; the tables.
    """
    scored = any(table.value(row) is not None for row in table.points)
    # What seeds do is a spread at each place, not an axis, unless there is no other.
    means = settings(table)
    keys = [key for key in table.swept if key != SEED or table.swept == [SEED]][:_MOST_PANELS] if scored else []
    blocks: list[_Block] = [(means_grid(table), [None, *means])] if means else []
    blocks.append((table.grid()[: _MOST_ROWS + 1], [None, *table.rows]))
    widths = [[max(int(font().getlength(line[c])) for line in g) + _GAP for c in range(len(g[0]))] for g, _ in blocks]
    across = min(_ACROSS, len(keys)) or 1
    bands = math.ceil(len(keys) / across)
    title = int(font(24).getlength(table.title))
    width = 2 * _MARGIN + max(across * (_PANEL[0] + _GAP) - _GAP, max(map(sum, widths)) + _GAP, title)
    top = _MARGIN + 46 + bands * (_PANEL[1] + _GAP)
    lines = sum(len(grid) + 1 for grid, _ in blocks) - 1 + (len(table.points) > _MOST_ROWS)
    picture = Image.new("RGB", (width, top + _ROW * lines + _MARGIN), PAGE)
    pen = ImageDraw.Draw(picture)
    pen.text((_MARGIN, _MARGIN), table.title, font=font(24), fill=INK)
    for number, key in enumerate(keys):
        left = _MARGIN + number % across * (_PANEL[0] + _GAP)
        _panel(pen, table, key, (left, _MARGIN + 46 + number // across * (_PANEL[1] + _GAP)))
    for block, columns in zip(blocks, widths, strict=True):
        _table(pen, table, block, columns, top)
        top += _ROW * (len(block[0]) + 1)
    if (more := len(table.points) - _MOST_ROWS) > 0:
        pen.text((_MARGIN, top - _ROW), f"and {more} more, in table.csv", font=font(), fill=FAINT)
    return picture


def axis(values: Sequence[str | float]) -> Axis:
    """Lay values out: on a logarithm where they span decades, evenly in order where they are no numbers."""
    numbers = [_number(value) for value in values]
    finite = [number for number in numbers if number is not None]
    if len(finite) < len(values):
        names = sorted(set(map(str, values)))
        places = {name: (i + 0.5) / len(names) for i, name in enumerate(names)}
        shown = dict(zip(names, _brief(names), strict=True))
        return Axis(lambda value: places[str(value)], [(place, shown[name]) for name, place in places.items()])
    low, high = min(finite), max(finite)
    logarithm = low > 0 and high / low >= 20
    scale = math.log10 if logarithm else float
    span = scale(high) - scale(low) or 1.0
    start = scale(low) - (0.06 * span if high > low else 0.5)
    whole = 1.12 * span if high > low else 1.0
    ticks = sorted(set(finite))
    if len(ticks) > 5:
        ticks = _decades(low, high) if logarithm else [low + (high - low) * i / 4 for i in range(5)]
    return Axis(lambda v: (scale(float(v)) - start) / whole, [((scale(t) - start) / whole, f"{t:.4g}") for t in ticks])


def _brief(names: list[str]) -> list[str]:
    """Names as they stand at an axis: of recipes and other paths the last word, where that tells them apart."""
    last = [name.rpartition("/")[2] for name in names]
    return last if all(map(_PATH.fullmatch, names)) and len(set(last)) == len(names) else names


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    inside = [10.0**power for power in range(first, last + 1) if low <= 10.0**power <= high]
    return inside if 2 <= len(inside) <= 6 else [low, math.sqrt(low * high), high]


def _panel(pen: ImageDraw.ImageDraw, table: SweepTable, key: str, corner: tuple[int, int]) -> None:
    shown = [(row, value) for row in table.rows if (value := table.value(row)) is not None and key in row.swept]
    left, top = corner
    pen.rounded_rectangle((left, top, left + _PANEL[0], top + _PANEL[1]), 8, fill=CARD, outline=LINE)
    pen.text((left + 12, top + 8), f"{table.metric} over {key}", font=font(), fill=INK)
    if not shown:
        return
    x0, x1, y0, y1 = left + _LEFT, left + _PANEL[0] - _RIGHT, top + _TOP, top + _PANEL[1] - _BOTTOM
    bars = [bar for setting in settings(table) if (bar := _bar(setting, table.metric)) and key in setting.swept]
    across = axis([row.swept[key] for row, _ in shown])
    up = axis([*(value for _, value in shown), *(end for bar in bars for end in bar[1:])])
    written = 2.0
    for place, text in reversed(up.ticks):
        if written - place < 0.08:
            continue  # it would be written over the one above
        written, y = place, y1 - place * (y1 - y0)
        pen.line((x0, y, x1, y), fill=PAGE)
        pen.text((x0 - 8, y), text, font=font(13), fill=FAINT, anchor="rm")
    for place, text, line in _apart(across.ticks, x1 - x0):
        x = x0 + place * (x1 - x0)
        pen.line((x, y1, x, y1 + 4), fill=LINE)
        pen.text((x, y1 + 7 + 15 * line), text, font=font(13), fill=FAINT, anchor="ma")
    pen.line((x0, y0, x0, y1, x1, y1), fill=LINE)
    for swept, *ends in bars:
        x = x0 + across.place(swept[key]) * (x1 - x0)
        low, high = (y1 - up.place(end) * (y1 - y0) for end in ends)
        pen.line((x, low, x, high), fill=FAINT, width=2)
        pen.line((x - 12, (low + high) / 2, x + 12, (low + high) / 2), fill=INK, width=3)
    spots = [(x0 + across.place(row.swept[key]) * (x1 - x0), y1 - up.place(value) * (y1 - y0)) for row, value in shown]
    if table.swept == [key]:
        pen.line(sorted(spots), fill=LINE, width=2)
    # The best is the first row: drawn last, on top.
    for number, (x, y) in reversed(list(enumerate(spots))):
        radius, colour = (6, GOOD) if shown[number][0] is table.rows[0] else (4, _POINT)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _bar(setting: Setting, metric: str) -> tuple[dict[str, str], float, float] | None:
    """A setting's overrides, and its mean less and plus the spread."""
    mean, spread = setting.mean(metric), setting.spread(metric)
    return None if mean is None or spread is None else (setting.swept, mean - spread, mean + spread)


def _apart(ticks: list[tuple[float, str]], width: int) -> list[tuple[float, str, int]]:
    """Place, text and line (0, 1) of ticks; what would be written over what stands to the left of it is left out."""
    kept: list[tuple[float, str, int]] = []
    ends = [-math.inf, -math.inf]
    for place, text in sorted(ticks):
        text = text if len(text) <= 16 else f"{text[:15]}…"
        half = font(13).getlength(text) / 2
        line = next((line for line, end in enumerate(ends) if place * width - half > end + 6), None)
        if line is not None:
            kept.append((place, text, line))
            ends[line] = place * width + half
    return kept


def _table(pen: ImageDraw.ImageDraw, table: SweepTable, block: _Block, widths: list[int], top: int) -> None:
    for number, (line, about) in enumerate(zip(*block, strict=False)):
        y = top + number * _ROW
        if number % 2:
            pen.rectangle((_MARGIN - 6, y - 3, _MARGIN + sum(widths), y + _ROW - 4), fill=CARD)
        x = _MARGIN
        for cell, width in zip(line, widths, strict=True):
            pen.text((x, y), cell, font=font(), fill=_colour(table, about, number == 1))
            x += width


def _colour(table: SweepTable, about: Row | Setting | None, first: bool) -> str:
    """Of a line of a table: the best is green, a failed point red."""
    if about is None:
        return FAINT
    if isinstance(about, Setting):
        return GOOD if first and about.mean(table.metric) is not None else INK
    if first and table.value(about) is not None:
        return GOOD
    return FAINT if about.status == "missing" else BAD if about.status == "failed" else INK


def _number(value: str | float) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
