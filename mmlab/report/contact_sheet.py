"""Contact sheets: images in a grid of cards, each with its text and, optionally, a colored edge."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GOOD = "#2e7d32"
BAD = "#c62828"
PAGE, CARD, LINE, INK, FAINT = "#eef0f3", "#ffffff", "#d5d9e0", "#1c2330", "#8a93a3"
_MARGIN, _GAP, _PADDING, _STRIPE = 24, 16, 12, 6
_FONT_SIZE, _LEADING, _TITLE_HEIGHT = 15, 20, 46
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf")  # Pillow's own has little more than ASCII


def contact_sheet(
    pictures: Sequence,
    texts: Sequence[str],
    columns: int = 4,
    colors: Sequence[str | None] | None = None,
    labels: Sequence[str] | None = None,
    title: str = "",
    cell: int = 256,
    max_lines: int = 16,
    table: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Lay images out as cards.

    Args:
        pictures: N images, each a PIL image, a tensor or array `[3, H, W]` (uint8, or 0…1 floats), or None.
        texts: N texts, with line breaks; long lines are wrapped.
        columns: cards per row.
        colors: N colors such as `GOOD` and `BAD`, or None: the card's upper edge and its text's last line.
        labels: N short lines above the texts, in a fainter color, such as keys.
        title: a line above the cards.
        cell: side of the square that an image is fitted into, in pixels; a row is as tall as its tallest image.
        max_lines: lines of text; longer texts are cut off with an ellipsis.
        table: rows of equally many cells, shown between title and cards; the first one is the head.

    Returns:
        The sheet, RGB.

    Raises:
        ValueError: pictures, texts, colors and labels differ in number.
    """
    colors = [None] * len(pictures) if colors is None else colors
    labels = [""] * len(pictures) if labels is None else labels
    if len({len(pictures), len(texts), len(colors), len(labels)}) != 1 or not pictures:
        counts = f"{len(pictures)} pictures, {len(texts)} texts, {len(colors)} colors, {len(labels)} labels"
        raise ValueError(f"a sheet needs equal numbers of each, and at least one: {counts}")
    notes = [_notes(*pair, cell, max_lines) for pair in zip(labels, texts, strict=True)]
    columns = max(1, min(columns, len(pictures)))
    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    fitted = [None if picture is None else _fit(as_picture(picture), cell) for picture in pictures]
    # A row is as tall as its tallest image, because pairs side by side are wider than tall.
    sides = [max(cell if (one := fitted[i]) is None else one.height for i in row) for row in rows]
    lines = [max(len(notes[i]) for i in row) for row in rows]
    heights = [_STRIPE + 3 * _PADDING + side + _LEADING * most for side, most in zip(sides, lines, strict=True)]
    card = cell + 2 * _PADDING
    top = _MARGIN + (_TITLE_HEIGHT if title else 0)
    above, top = top, top + (_LEADING * len(table) + _GAP if table else 0)
    width = 2 * _MARGIN + columns * (card + _GAP) - _GAP
    sheet = Image.new("RGB", (width, top + sum(heights) + (len(rows) - 1) * _GAP + _MARGIN), PAGE)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN), title, font=font(24), fill=INK)
    _tabulate(pen, table, (_MARGIN, above))
    for row, side, height in zip(rows, sides, heights, strict=True):
        for column, i in enumerate(row):
            left = _MARGIN + column * (card + _GAP)
            _frame(pen, (left, top, left + card, top + height), colors[i])
            _paste(sheet, pen, fitted[i], (left + _PADDING, top + _STRIPE + _PADDING), (cell, side))
            _write(pen, notes[i], (left + _PADDING, top + _STRIPE + 2 * _PADDING + side), colors[i])
        top += height + _GAP
    return sheet


def as_picture(picture) -> Image.Image:
    """A PIL RGB image of a PIL image, or of a tensor or array `[3, H, W]` in uint8 or in floats of 0…1."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    pixels = np.asarray(picture)
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"an image has the shape [3, H, W], not {list(pixels.shape)}")
    if pixels.dtype != np.uint8:
        pixels = (pixels.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


@cache
def font(size: int = _FONT_SIZE):
    """A font of this machine with more than ASCII, or else Pillow's own."""
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _tabulate(pen: ImageDraw.ImageDraw, table: Sequence[Sequence[str]], corner: tuple[int, int]) -> None:
    """The first column is flush left, the others flush right."""
    face, (left, top) = font(), corner
    for n, column in enumerate(zip(*table, strict=True)):
        width = max(face.getlength(text) for text in column)
        left += _MARGIN if n else 0
        for row, text in enumerate(column):
            place = (left + width if n else left, top + row * _LEADING)
            pen.text(place, text, font=face, fill=INK if row else FAINT, anchor="ra" if n else "la")
        left += round(width)


def _frame(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], color: str | None) -> None:
    pen.rounded_rectangle(box, 8, fill=color or CARD, outline=LINE)
    if color:
        left, top, right, bottom = box
        below = (left + 1, top + _STRIPE, right - 1, bottom - 1)
        pen.rounded_rectangle(below, 7, fill=CARD, corners=(False, False, True, True))


def _paste(sheet, pen, fitted: Image.Image | None, corner: tuple[int, int], room: tuple[int, int]) -> None:
    (left, top), (width, height) = corner, room
    if fitted is None:
        pen.rectangle((left, top, left + width - 1, top + height - 1), fill=PAGE)
        pen.text((left + width / 2, top + height / 2), "text only", font=font(), fill=FAINT, anchor="mm")
        return
    left, top = left + (width - fitted.width) // 2, top + (height - fitted.height) // 2
    sheet.paste(fitted, (left, top))
    pen.rectangle((left - 1, top - 1, left + fitted.width, top + fitted.height), outline=LINE)


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """Shrink a large image smoothly; enlarge a small one by an integer factor, so that its pixels stay visible."""
    longest = max(picture.size)
    if longest > cell:
        width, height = (max(1, round(side * cell / longest)) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    factor = cell // longest
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _write(pen, notes: list[tuple[str, str]], corner: tuple[int, int], color: str | None) -> None:
    face = font()
    for number, (line, ink) in enumerate(notes):
        ink = color if color and number == len(notes) - 1 else ink
        pen.text((corner[0], corner[1] + number * _LEADING), line, font=face, fill=ink)


def _notes(label: str, text: str, width: int, max_lines: int) -> list[tuple[str, str]]:
    """The lines below an image, each with its color."""
    lines = [(line, FAINT) for line in _wrap(label, width, 1) if line]
    return lines + [(line, INK) for line in _wrap(text, width, max_lines)]


def _wrap(text: str, width: int, max_lines: int) -> list[str]:
    """Break a text into lines that fit `width` pixels; words longer than a line are broken, too."""
    face, lines = font(), []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            joined = f"{line} {word}" if line else word
            if face.getlength(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            line = word
            while face.getlength(line) > width:
                fits = max((n for n in range(1, len(line)) if face.getlength(line[:n]) <= width), default=1)
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], "…"]
    return lines
