"""A sweep as a picture: the metric against each swept value, and the table below."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from mmlab.report.sheet import BAD, CARD, FAINT, GOOD, INK, LINE, PAGE, font
from mmlab.report.sweep_table import Row, SweepTable

_POINT = "#3366cc"
_MARGIN, _PANEL, _GAP, _ROW = 24, (400, 300), 16, 24
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 20, 36, 44  # around a panel's axes
_MOST_PANELS, _MOST_ROWS = 6, 60
_ACROSS = 3


@dataclass(frozen=True)
class Axis:
    """Where values lie between 0 and 1, and which of them are written beside the axis."""

    place: Callable[[str | float], float]
    ticks: list[tuple[float, str]]


def write_sweep(table: SweepTable, folder: Path) -> None:
    """Write `table.csv` and `table.png` into a sweep's folder; neither is ever half there."""
    draft = folder / f".table.{os.getpid()}"
    draft.write_text(table.csv(), encoding="utf-8")
    draft.replace(folder / "table.csv")
    sweep_picture(table).save(draft, format="PNG")
    draft.replace(folder / "table.png")


def sweep_picture(table: SweepTable) -> Image.Image:
    """Draw a sweep.

    Returns:
        An RGB image: a panel for each swept key once a point is complete, the best point in green; the table.
    """
    keys = table.swept[:_MOST_PANELS] if any(table.value(row) is not None for row in table.points) else []
    lines = table.grid()[: _MOST_ROWS + 1]
    widths = [max(int(font().getlength(line[c])) for line in lines) + _GAP for c in range(len(lines[0]))]
    across = min(_ACROSS, len(keys)) or 1
    bands = math.ceil(len(keys) / across)
    title = int(font(24).getlength(table.title))
    width = 2 * _MARGIN + max(across * (_PANEL[0] + _GAP) - _GAP, sum(widths) + _GAP, title)
    top = _MARGIN + 46 + bands * (_PANEL[1] + _GAP)
    picture = Image.new("RGB", (width, top + _ROW * (len(lines) + (len(table.points) > _MOST_ROWS)) + _MARGIN), PAGE)
    pen = ImageDraw.Draw(picture)
    pen.text((_MARGIN, _MARGIN), table.title, font=font(24), fill=INK)
    for number, key in enumerate(keys):
        left = _MARGIN + number % across * (_PANEL[0] + _GAP)
        _panel(pen, table, key, (left, _MARGIN + 46 + number // across * (_PANEL[1] + _GAP)))
    _table(pen, table, lines, widths, top)
    return picture


def axis(values: Sequence[str | float]) -> Axis:
    """Lay values out: on a logarithm where they span decades, evenly in order where they are no numbers."""
    numbers = [_number(value) for value in values]
    finite = [number for number in numbers if number is not None]
    if len(finite) < len(values):
        names = sorted(set(map(str, values)))
        places = {name: (i + 0.5) / len(names) for i, name in enumerate(names)}
        return Axis(lambda value: places[str(value)], [(place, name) for name, place in places.items()])
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
    across, up = axis([row.swept[key] for row, _ in shown]), axis([value for _, value in shown])
    written = 2.0
    for place, text in reversed(up.ticks):
        if written - place < 0.08:
            continue  # it would be written over the one above
        written, y = place, y1 - place * (y1 - y0)
        pen.line((x0, y, x1, y), fill=PAGE)
        pen.text((x0 - 8, y), text, font=font(13), fill=FAINT, anchor="rm")
    for place, text in _apart(across.ticks, x1 - x0):
        x = x0 + place * (x1 - x0)
        pen.line((x, y1, x, y1 + 4), fill=LINE)
        pen.text((x, y1 + 8), text, font=font(13), fill=FAINT, anchor="ma")
    pen.line((x0, y0, x0, y1, x1, y1), fill=LINE)
    spots = [(x0 + across.place(row.swept[key]) * (x1 - x0), y1 - up.place(value) * (y1 - y0)) for row, value in shown]
    if table.swept == [key]:
        pen.line(sorted(spots), fill=LINE, width=2)
    # The best is the first row: drawn last, on top.
    for number, (x, y) in reversed(list(enumerate(spots))):
        radius, colour = (6, GOOD) if shown[number][0] is table.rows[0] else (4, _POINT)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _apart(ticks: list[tuple[float, str]], width: int) -> list[tuple[float, str]]:
    """Leave out what would be written over what stands to the left of it."""
    kept: list[tuple[float, str]] = []
    end = -math.inf
    for place, text in sorted(ticks):
        text = text if len(text) <= 16 else f"{text[:15]}…"
        half = font(13).getlength(text) / 2
        if place * width - half > end + 6:
            kept.append((place, text))
            end = place * width + half
    return kept


def _table(pen: ImageDraw.ImageDraw, table: SweepTable, lines: list[list[str]], widths: list[int], top: int) -> None:
    rows: list[Row | None] = [None, *table.rows]
    for number, (line, row) in enumerate(zip(lines, rows, strict=False)):
        y = top + number * _ROW
        if number % 2:
            pen.rectangle((_MARGIN - 6, y - 3, _MARGIN + sum(widths), y + _ROW - 4), fill=CARD)
        x = _MARGIN
        for cell, width in zip(line, widths, strict=True):
            colour = FAINT if row is None or row.status == "missing" else BAD if row.status == "failed" else INK
            best = number == 1 and row is not None and table.value(row) is not None
            pen.text((x, y), cell, font=font(), fill=GOOD if best else colour)
            x += width
    if (more := len(table.points) - _MOST_ROWS) > 0:
        pen.text((_MARGIN, top + len(lines) * _ROW), f"and {more} more, in table.csv", font=font(), fill=FAINT)


def _number(value: str | float) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
