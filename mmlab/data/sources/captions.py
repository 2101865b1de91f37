"""A folder of pictures with captions: text files beside them, or a table (CSV, TSV, JSON lines)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlab.config.errors import DataError
from mmlab.data.formats import IMAGE_EXTENSIONS, KeyMaker
from mmlab.data.shards import Samples
from mmlab.data.sources.files import CLASS_FIELDS, IMAGE_FIELDS, PictureFolder, class_of, column, optional_column, rows

_CAPTION_FIELDS = ("caption", "text", "title")


@dataclass(frozen=True)
class _Entry:
    """A picture of the data set: where it was named, its path from the folder, caption (or empty) and class."""

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
    """Read captioned pictures.

    Args:
        images: the picture folder. Without a table each `x.jpg` takes its caption from `x.txt` beside it.
        table: a `.csv`, `.tsv` or `.jsonl` file with a picture's path (from `images`) and a caption per row;
            a picture with several rows makes several samples.
        image_field: the column of the path; None takes the first of `image`, `file`, `filename`, `path`, …
        caption_field: the column of the caption; None takes `caption`, `text` or `title`.
        class_field: the column of the class, a name or a number; None takes `class` or `label` where there is one.
        missing_budget: share of the rows whose picture may be absent or unreadable.

    Returns:
        Counts: `samples`, `missing` (no such picture), `unsupported` (not JPEG, PNG, WebP), `without_caption`
        (left out).

    Raises:
        DataError: no such folder or table, a malformed row (named by its number), or a budget overrun.
    """
    if table is None:
        entries = list(_side_files(Path(images)))
    else:
        entries = list(_table(Path(table), image_field, caption_field, class_field))
    folder = PictureFolder(images, missing_budget, len(entries))
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
    """Every picture; the caption of one without a text file is empty."""
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
            raise DataError(f"{where}: '{image}' and '{caption}' must be texts.")
        yield _Entry(where, row[image], (row.get(caption) or "").strip(), class_of(row, kind, where))
