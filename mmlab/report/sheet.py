"""Contact sheets: pictures in a grid of cards, each with its text and, where wanted, a verdict's colour."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GOOD = "#2e7d32"
BAD = "#c62828"
PAGE, CARD, LINE, INK, FAINT = "#eef0f3", "#ffffff", "#d5d9e0", "#1c2330", "#8a93a3"
_MARGIN, _GAP, _PADDING, _STRIPE = 24, 16, 12, 6
_FONT_SIZE, _LEADING, _TITLE_HEIGHT = 15, 20, 46
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf")  # Pillow's own knows ASCII and little else


def contact_sheet(
    pictures: Sequence,
    texts: Sequence[str],
    columns: int = 4,
    colours: Sequence[str | None] | None = None,
    labels: Sequence[str] | None = None,
    title: str = "",
    cell: int = 256,
    max_lines: int = 16,
) -> Image.Image:
    """Lay pictures out as cards.

    Args:
        pictures: N pictures, each a PIL image, a tensor or array `[3, H, W]` (uint8, or 0…1 floats), or None.
        texts: N texts; line breaks are kept and long lines wrapped.
        columns: cards per row.
        colours: N colours such as `GOOD` and `BAD`, or None: the card's upper edge and its text's last line.
        labels: N short lines above the texts, in a fainter ink, such as keys.
        title: a line above the cards.
        cell: side of the square that a picture is fitted into, in pixels; a row is as tall as its tallest picture.
        max_lines: lines of text before it is cut with an ellipsis.

    Returns:
        The sheet, RGB.

    Raises:
        ValueError: pictures, texts, colours and labels differ in number.
    """
    colours = [None] * len(pictures) if colours is None else colours
    labels = [""] * len(pictures) if labels is None else labels
    if len({len(pictures), len(texts), len(colours), len(labels)}) != 1 or not pictures:
        counts = f"{len(pictures)} pictures, {len(texts)} texts, {len(colours)} colours, {len(labels)} labels"
        raise ValueError(f"a sheet needs as many of each, and one at least: {counts}")
    notes = [_notes(*pair, cell, max_lines) for pair in zip(labels, texts, strict=True)]
    columns = max(1, min(columns, len(pictures)))
    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    fitted = [None if picture is None else _fit(as_picture(picture), cell) for picture in pictures]
    # A row is as tall as its tallest picture: pairs side by side would float in squares.
    sides = [max(cell if (one := fitted[i]) is None else one.height for i in row) for row in rows]
    lines = [max(len(notes[i]) for i in row) for row in rows]
    heights = [_STRIPE + 3 * _PADDING + side + _LEADING * most for side, most in zip(sides, lines, strict=True)]
    card = cell + 2 * _PADDING
    top = _MARGIN + (_TITLE_HEIGHT if title else 0)
    width = 2 * _MARGIN + columns * (card + _GAP) - _GAP
    sheet = Image.new("RGB", (width, top + sum(heights) + (len(rows) - 1) * _GAP + _MARGIN), PAGE)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN), title, font=font(24), fill=INK)
    for row, side, height in zip(rows, sides, heights, strict=True):
        for column, i in enumerate(row):
            left = _MARGIN + column * (card + _GAP)
            _frame(pen, (left, top, left + card, top + height), colours[i])
            _paste(sheet, pen, fitted[i], (left + _PADDING, top + _STRIPE + _PADDING), (cell, side))
            _write(pen, notes[i], (left + _PADDING, top + _STRIPE + 2 * _PADDING + side), colours[i])
        top += height + _GAP
    return sheet


def as_picture(picture) -> Image.Image:
    """A PIL RGB image of a PIL image, or of a tensor or array `[3, H, W]` in uint8 or in floats of 0…1."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    pixels = np.asarray(picture)
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"a picture has the shape [3, H, W], not {list(pixels.shape)}")
    if pixels.dtype != np.uint8:
        pixels = (pixels.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


@cache
def font(size: int = _FONT_SIZE):
    """A font of this machine that knows more than ASCII, where there is one."""
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _frame(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: str | None) -> None:
    pen.rounded_rectangle(box, 8, fill=colour or CARD, outline=LINE)
    if colour:
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
    """Shrink a large picture smoothly; enlarge a small one by whole pixels, so that its own stay visible."""
    longest = max(picture.size)
    if longest > cell:
        width, height = (max(1, round(side * cell / longest)) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    factor = cell // longest
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _write(pen, notes: list[tuple[str, str]], corner: tuple[int, int], colour: str | None) -> None:
    face = font()
    for number, (line, ink) in enumerate(notes):
        ink = colour if colour and number == len(notes) - 1 else ink
        pen.text((corner[0], corner[1] + number * _LEADING), line, font=face, fill=ink)


def _notes(label: str, text: str, width: int, max_lines: int) -> list[tuple[str, str]]:
    """The lines below a picture, each with its ink."""
    lines = [(line, FAINT) for line in _wrap(label, width, 1) if line]
    return lines + [(line, INK) for line in _wrap(text, width, max_lines)]


def _wrap(text: str, width: int, max_lines: int) -> list[str]:
    """Break a text into lines that fit `width` pixels; words that are longer than a line are broken too."""
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
