"""A folder of images with captions: text files beside them, or a table (CSV, TSV, JSON lines)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlab.config.errors import DataError
from mmlab.data.formats import IMAGE_EXTENSIONS, KeyMaker
from mmlab.data.shard_files import Samples
from mmlab.data.sources.files import CLASS_FIELDS, IMAGE_FIELDS, ImageFolder, class_of, column, optional_column, rows

_CAPTION_FIELDS = ("caption", "text", "title")


@dataclass(frozen=True)
class _Entry:
    """An image: where the data set names it, its path in the folder, its caption (or empty) and its class."""

    where: str
    name: str
    caption: str
    kind: str | int | None = None


def captions(
    images: str | Path,
    table: str | Path | None = None,
    image_field: str | None = None,
    caption_field: str | None = None,
    class_field: str | None = None,
    missing_budget: float = 0.0,
) -> Samples:
    """Read captioned images.

    Args:
        images: the image folder. Without a table, the caption of each `x.jpg` is in `x.txt` beside it.
        table: a `.csv`, `.tsv` or `.jsonl` file; each row has an image's path (in `images`) and a caption, and
            makes one sample.
        image_field: the column of the path; None: the first of `image`, `file`, `filename`, `path`, …
        caption_field: the column of the caption; None: `caption`, `text` or `title`.
        class_field: the column of the class, a name or a number; None: `class` or `label`, if there is one.
        missing_budget: share of the rows whose image may be missing or unsupported.

    Returns:
        Counts: `samples`, `missing` (no such image), `unsupported` (not JPEG, PNG or WebP), `without_caption`
        (skipped).

    Raises:
        DataError: no such folder or table, a malformed row (with its number), or more losses than the budget allows.
    """
    if table is None:
        entries = list(_side_files(Path(images)))
    else:
        entries = list(_table(Path(table), image_field, caption_field, class_field))
    folder = ImageFolder(images, missing_budget, len(entries))
    keys = KeyMaker()
    counts = {"samples": 0, "without_caption": 0}
    for entry in entries:
        if not entry.caption:
            counts["without_caption"] += 1
        elif (picture := folder.read(entry.name, entry.where)) is not None:
            counts["samples"] += 1
            extension, data = picture
            record: dict[str, Any] = {"id": entry.name, "caption": entry.caption}
            if entry.kind is not None:
                record["class"] = entry.kind
            yield keys(str(Path(entry.name).with_suffix(""))), {extension: data, "json": record}
    return {**counts, "missing": folder.missing, "unsupported": folder.unsupported}


def _side_files(folder: Path) -> Iterator[_Entry]:
    """Every image; the caption of one without a text file is empty."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS:
            text = path.with_suffix(".txt")
            caption = text.read_text("utf-8").strip() if text.is_file() else ""
            yield _Entry(str(path), str(path.relative_to(folder)), caption)


def _table(path: Path, image_field: str | None, caption_field: str | None, class_field: str | None) -> Iterator[_Entry]:
    """Every row of a table."""
    image = caption = kind = None
    for where, row in rows(path):
        if image is None or caption is None:
            image = column(row, image_field, IMAGE_FIELDS, where)
            caption = column(row, caption_field, _CAPTION_FIELDS, where)
        kind = kind or optional_column(row, class_field, CLASS_FIELDS, where)
        if not isinstance(row.get(image), str) or not isinstance(row.get(caption), (str, type(None))):
            raise DataError(f"{where}: '{image}' and '{caption}' must be text.")
        yield _Entry(where, row[image], (row.get(caption) or "").strip(), class_of(row, kind, where))
