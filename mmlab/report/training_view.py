"""Samples as a recipe trains on them: which text is the prompt, which is learned, and which does not fit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from mmlab.data.batch import IGNORE
from mmlab.data.class_texts import class_name
from mmlab.data.collate import ChatCollate, PairCollate
from mmlab.data.conversation import Segment, encode
from mmlab.data.dialogues import caption_of
from mmlab.data.sample_types import Picture, Sample, SampleError
from mmlab.report.contact_sheet import CARD, FAINT, INK, LINE, PAGE, as_picture, font

PROMPT, SUPERVISED, CUT, IMAGE = "prompt", "supervised", "cut off", "image"
MARKS = {PROMPT: ("", ""), SUPERVISED: ("⟦", "⟧"), CUT: ("⟪", "⟫"), IMAGE: ("", "")}
"""What stands around a text where there is no color."""
STYLES = {PROMPT: "", SUPERVISED: "\x1b[1;32m", CUT: "\x1b[9;31m", IMAGE: "\x1b[36m"}
_FILLS = {PROMPT: CARD, SUPERVISED: "#c8e6c9", CUT: "#ffcdd2", IMAGE: "#cfe3fb"}
_WIDTH, _PICTURE, _MARGIN, _LEADING, _GAP = 1120, 320, 20, 24, 8


@dataclass(frozen=True)
class Piece:
    """A text and its state: `PROMPT`, `SUPERVISED`, `CUT` or `IMAGE`."""

    text: str
    state: str


@dataclass(frozen=True)
class View:
    """One sample.

    Attributes:
        key: its key.
        record: its record.
        pictures: as the model gets them.
        texts: the pieces of each sequence.
        counts: what the data report counts.
        error: why training would replace the sample, or None.
    """

    key: str
    record: dict[str, Any]
    pictures: Sequence[Picture]
    texts: list[list[Piece]]
    counts: dict[str, int]
    error: str | None = None


def view_of(collate: Any, sample: Sample) -> View:
    """The view of a sample, as its collate prepares it."""
    texts: list[list[Piece]] = []
    counts: dict[str, int] = {}
    error = None
    try:
        texts = list(_texts(collate, sample))
        counts = collate.prepare(sample).counters
    except SampleError as caught:
        error = f"training would replace this sample ({caught.reason}): {caught}"
    return View(sample.key, sample.record, sample.pictures, texts, counts, error)


def shape_of(picture: Picture) -> str:
    """The size of a picture as the model gets it; of several tiles, with the places that they take."""
    count, _, height, width = picture.tiles.shape
    if count == 1:
        return f"{width} × {height}"
    rows = (count - 1) // picture.columns
    tiles = f"1 + {rows} × {picture.columns} tiles of {width} × {height}"
    return f"{tiles}, {len(picture.places)} tokens"


def _texts(collate: Any, sample: Sample) -> Iterator[list[Piece]]:
    if isinstance(collate, ChatCollate):
        places = collate.places(sample)
        for dialogue in collate.dialogues(sample):
            whole = encode(dialogue, collate.prompt, collate.tokenizer, places)
            try:
                fits = encode(dialogue, collate.prompt, collate.tokenizer, places, collate.config.max_length)
            except SampleError as error:
                if error.reason != "too-long":
                    raise
                fits = Segment([], [])
            yield _dialogue(whole, fits, places, collate)
        return
    conditioning: Any = getattr(collate, "conditioning", None)
    if getattr(conditioning, "labels", None) is not None:
        yield [Piece(f"class: {class_name(sample.record, sample.members) or 'none'}", PROMPT)]
    if isinstance(collate, PairCollate):
        yield _caption(collate.caption(sample), collate.tokenizer, collate.config.max_length)
        return
    tokenizer, caption = getattr(conditioning, "tokenizer", None), caption_of(sample.record, sample.seed)
    if tokenizer is not None and caption is not None:
        yield _caption(caption, tokenizer, conditioning.max_length)


def _caption(caption: str, tokenizer: Any, length: int) -> list[Piece]:
    """The pieces of a caption, of which `length` tokens fit."""
    whole = list(tokenizer(caption, verbose=False)["input_ids"])
    fits = list(tokenizer(caption, truncation=True, max_length=length)["input_ids"])
    # A cut caption keeps its closing special token.
    same = next((n for n, (a, b) in enumerate(zip(whole, fits, strict=False)) if a != b), len(fits))
    states = [PROMPT if n < same else CUT for n in range(len(whole))]
    return list(_joined(whole, states, tokenizer))


def _dialogue(whole: Segment, fits: Segment, places: Sequence[int], collate: ChatCollate) -> list[Piece]:
    """The pieces of a dialogue, of which `fits` is the part that is trained on."""
    same = zip(whole.input_ids, fits.input_ids, strict=False)
    kept = next((n for n, (a, b) in enumerate(same) if a != b), min(len(whole), len(fits)))
    # The first token has no label: nothing comes before it.
    learned = [n > 0 and label != IGNORE for n, label in enumerate(whole.labels)]
    states = [CUT if n >= kept else SUPERVISED if learned[n] else PROMPT for n in range(len(whole))]
    pieces: list[Piece] = []
    at = 0
    for start, tokens in zip(whole.image_starts, places, strict=False):
        pieces += _joined(whole.input_ids[at:start], states[at:start], collate.tokenizer)
        what = "image" if collate.image else "scattered caption"
        pieces.append(Piece(f"<{what}: {tokens} tokens>", CUT if start >= kept else IMAGE))
        at = start + tokens
    return pieces + list(_joined(whole.input_ids[at:], states[at:], collate.tokenizer))


def _joined(ids: Sequence[int], states: Sequence[str], tokenizer: Any) -> Iterator[Piece]:
    """Neighboring tokens of one state as text; a token's text may depend on those before it, so all are decoded."""

    def text(end: int) -> str:
        return tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or states[end] != states[start]:
            yield Piece(text(end)[len(text(start)) :], states[start])
            start = end


def view_sheet(views: Sequence[View], title: str) -> Image.Image:
    """The samples below each other, each with the image that the model gets and its colored texts, RGB."""
    cards = [_card(view) for view in views]
    height = 90 + sum(card.height + _MARGIN for card in cards)
    sheet = Image.new("RGB", (_WIDTH + 2 * _MARGIN, height), PAGE)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, 14), title, font=font(22), fill=INK)
    left = _MARGIN
    for state, fill in _FILLS.items():
        width = int(font().getlength(state)) + 12
        pen.rectangle((left, 50, left + width, 74), fill=fill, outline=LINE)
        pen.text((left + 6, 53), state, font=font(), fill=INK)
        left += width + 10
    top = 90
    for card in cards:
        sheet.paste(card, (_MARGIN, top))
        top += card.height + _MARGIN
    return sheet


def _card(view: View) -> Image.Image:
    pages = [[Piece(view.key, "title")], *view.texts]
    if view.counts:
        pages.append([Piece(", ".join(f"{name.replace('_', ' ')} {n}" for name, n in view.counts.items()), "title")])
    pages += [[Piece(view.error, CUT)]] if view.error else []
    left = _PICTURE + 2 * _MARGIN if view.pictures else _MARGIN
    draft = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    bottom = _flow(draft, pages, left)
    shown = _pictures(view.pictures)
    card = Image.new("RGB", (_WIDTH, max(bottom, shown.height + 2 * _MARGIN if view.pictures else 0) + _MARGIN), CARD)
    pen = ImageDraw.Draw(card)
    card.paste(shown, (_MARGIN, _MARGIN))
    _flow(pen, pages, left)
    pen.rectangle((0, 0, card.width - 1, card.height - 1), outline=LINE)
    return card


def _pictures(pictures: Sequence[Picture]) -> Image.Image:
    """Pictures below each other, each with its shape; more than two in two columns."""
    columns = 2 if len(pictures) > 2 else 1
    width = (_PICTURE - (columns - 1) * _GAP) // columns
    drawn = [_fit(_tiled(picture), width) for picture in pictures]
    rows = [range(start, min(start + columns, len(drawn))) for start in range(0, len(drawn), columns)]
    heights = [max(drawn[n].height for n in row) + _LEADING for row in rows]
    sheet = Image.new("RGB", (_PICTURE, max(1, sum(heights))), CARD)
    pen, top = ImageDraw.Draw(sheet), 0
    for row, height in zip(rows, heights, strict=True):
        for column, n in enumerate(row):
            left = column * (width + _GAP)
            sheet.paste(drawn[n], (left, top))
            pen.rectangle((left, top, left + drawn[n].width - 1, top + drawn[n].height - 1), outline=LINE)
            said = shape_of(pictures[n])
            if len(pictures[n].tiles) == 1:
                said += " px, as the model gets it" if columns == 1 else " px"
            elif columns > 1:  # which has less room
                said = f"{len(pictures[n].tiles)} tiles, {len(pictures[n].places)} tokens"
            pen.text((left, top + drawn[n].height + 4), said, font=font(), fill=FAINT)
        top += height
    return sheet


def _tiled(picture: Picture) -> Image.Image:
    """A picture as the model gets it: its base view, and beside it its tiles in their grid."""
    base, *tiles = [as_picture(tile) for tile in picture.tiles]
    if not tiles:
        return base
    side, gap, columns = base.width, max(1, base.width // 24), picture.columns
    rows = len(tiles) // columns
    size = side + 2 * gap + columns * (side + gap), rows * (side + gap) - gap
    sheet = Image.new("RGB", size, LINE)
    sheet.paste(base, (0, 0))
    sheet.paste(CARD, (0, side + gap, side + gap, size[1]))
    for n, tile in enumerate(tiles):
        row, column = divmod(n, columns)
        sheet.paste(tile, (side + 3 * gap + column * (side + gap), row * (side + gap)))
    return sheet


def _fit(picture: Image.Image, width: int) -> Image.Image:
    """A picture of that width, or as wide as a square of it."""
    factor = width / max(picture.size)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)


def _flow(pen: ImageDraw.ImageDraw, pages: list[list[Piece]], left: int) -> int:
    """Write texts in lines, each piece on its color; return the bottom."""
    face, y = font(), _MARGIN
    for pieces in pages:
        x = left
        for piece in pieces:
            fill = _FILLS.get(piece.state)
            for line_number, line in enumerate(piece.text.split("\n")):
                if line_number:
                    x, y = left, y + _LEADING
                for word in _words(line, face, _WIDTH - left - _MARGIN):
                    width = face.getlength(word)
                    if x + width > _WIDTH - _MARGIN and x > left:
                        x, y = left, y + _LEADING
                    if fill is not None and fill != CARD:
                        pen.rectangle((x, y, x + width, y + _LEADING - 3), fill=fill)
                    pen.text((x, y + 2), word, font=face, fill=FAINT if fill is None else INK)
                    if piece.state == CUT:
                        pen.line((x, y + _LEADING / 2, x + width, y + _LEADING / 2), fill="#c62828")
                    x += width
        y += _LEADING + 8
    return int(y)


def _words(line: str, face: Any, width: int) -> Iterator[str]:
    """Words with the space after them; those that are longer than a line in parts."""
    for word in line.split(" "):
        part = word
        while face.getlength(part) > width:
            fits = max((n for n in range(1, len(part)) if face.getlength(part[:n]) <= width), default=1)
            yield part[:fits]
            part = part[fits:]
        yield part + " "
