"""A folder of images with captions: text files beside them, or a table (CSV, TSV, JSON lines)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlab.data.building import Rows
from mmlab.data.dialogues import check_sample
from mmlab.data.formats import Members
from mmlab.data.sample_types import SampleError
from mmlab.data.sources.files import read_text
from mmlab.data.sources.pictures import ImageFolder, pictures_of
from mmlab.data.sources.tables import CLASS_FIELDS, IMAGE_FIELDS, Row, class_of, column, optional_column, rows
from mmlab.data.tally import Tally

_CAPTION_FIELDS = ("caption", "text", "title")


@dataclass(frozen=True)
class _Entry:
    """An image: its path in the folder, its caption, and the row with its class."""

    name: Any
    caption: Any
    row: Row
    class_column: str | None = None


def captions(
    images: str | Path,
    table: str | Path | None = None,
    image_field: str | None = None,
    caption_field: str | None = None,
    class_field: str | None = None,
    missing_budget: float = 0.0,
) -> Rows:
    """Read captioned images.

    Args:
        images: the image folder. Without a table, the caption of each `x.jpg` is in `x.txt` beside it.
        table: a `.csv`, `.tsv`, `.jsonl` or `.json` file; each row has an image's path (in `images`) and a caption,
            and makes one sample. MiniGPT-4's `filter_cap.json` is one, with ids for paths.
        image_field: the column of the path; None: the first of `image`, `file`, `filename`, `path`, …
        caption_field: the column of the caption; None: `caption`, `text` or `title`.
        class_field: the column of the class, a name or a number; None: `class` or `label`, if there is one.
        missing_budget: share of the rows whose image may be missing or unsupported.

    Returns:
        A row for each row of the table, or for each file of the folder that is no caption. Left out: `no-caption`, and
        what `ImageFolder.read`, `rows`, `class_of` and `pictures_of` name.

    Raises:
        DataError: no such folder or table, another encoding, quotation marks that do not match (with the line), or more
            lost images than the budget allows.
    """
    tally, folder = Tally(), ImageFolder(images)
    if table is None:
        entries = _side_files(Path(images), tally)
    else:
        entries = _table(Path(table), tally, Path(images), image_field, caption_field, class_field)

    def convert(where: str, entry: _Entry, tally: Tally) -> tuple[str, Members] | None:
        with tally.row(where):
            if not isinstance(entry.caption, str) or not entry.caption.strip():
                raise SampleError("no-caption", "It has no caption.")
            picture = folder.read(entry.name, where, tally)
            record: dict[str, Any] = {"id": picture.name, "caption": entry.caption.strip()}
            if (kind := class_of(entry.row, entry.class_column)) is not None:
                record["class"] = kind
            check_sample(record, ["caption"], 1)
            return str(Path(picture.name).with_suffix("")), {picture.extension: picture.data, "json": record}

    return Rows(entries, convert, tally, missing_budget)


def _side_files(folder: Path, tally: Tally) -> Iterator[tuple[str, _Entry]]:
    """Every image; the caption of one without a text file is empty."""
    texts: dict[Path, Path] = {}
    for path in list(pictures_of(folder, tally, texts)):
        text = texts.get(path.with_suffix(""))
        yield str(path), _Entry(str(path.relative_to(folder)), "" if text is None else read_text(text), {})


def _table(
    path: Path,
    tally: Tally,
    images: Path,
    image_field: str | None,
    caption_field: str | None,
    class_field: str | None,
) -> Iterator[tuple[str, _Entry]]:
    """Every row of a table."""
    image = caption = kind = None
    for where, row in rows(path, tally, images):
        if image is None or caption is None:
            image = column(row, image_field, IMAGE_FIELDS, where)
            caption = column(row, caption_field, _CAPTION_FIELDS, where)
        kind = kind or optional_column(row, class_field, CLASS_FIELDS, where)
        yield where, _Entry(row.get(image), row.get(caption), row, kind)
