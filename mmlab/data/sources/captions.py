"""A folder of pictures with captions: text files beside them, or a table (CSV, TSV, JSON lines)."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmlab.config.errors import DataError, nearest
from mmlab.data.formats import IMAGE_EXTENSIONS, KeyMaker
from mmlab.data.shards import Samples
from mmlab.data.sources.folder import PictureFolder

_IMAGE_FIELDS = ("image", "file", "filename", "file_name", "image_path", "path")
_CAPTION_FIELDS = ("caption", "text", "title")


def captions(
    images: str | Path,
    table: str | Path | None = None,
    image_field: str | None = None,
    caption_field: str | None = None,
    missing_budget: float = 0.0,
) -> Samples:
    """Read captioned pictures.

    Args:
        images: the picture folder. Without a table each `x.jpg` takes its caption from `x.txt` beside it.
        table: a `.csv`, `.tsv` or `.jsonl` file with a picture's path (from `images`) and a caption per row;
            a picture with several rows makes several samples.
        image_field: the column of the path; None takes the first of `image`, `file`, `filename`, `path`, …
        caption_field: the column of the caption; None takes `caption`, `text` or `title`.
        missing_budget: share of the rows whose picture may be absent or unreadable.

    Returns:
        Counts: `samples`, `missing` (no such picture), `unsupported` (not JPEG, PNG, WebP), `without_caption`
        (left out).

    Raises:
        DataError: no such folder or table, a malformed row (named by its number), or a budget overrun.
    """
    rows = list(_side_files(Path(images)) if table is None else _table(Path(table), image_field, caption_field))
    folder = PictureFolder(images, missing_budget, len(rows))
    keys = KeyMaker()
    counts = {"samples": 0, "without_caption": 0}
    for where, name, caption in rows:
        if not caption:
            counts["without_caption"] += 1
        elif (picture := folder.read(name, where)) is not None:
            counts["samples"] += 1
            kind, data = picture
            yield (
                keys(str(Path(name).with_suffix(""))),
                {kind: data, "json": {"id": name, "caption": caption}},
            )
    return {**counts, "missing": folder.missing, "unsupported": folder.unsupported}


def _side_files(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(where, picture's path from the folder, caption) of each picture; no text file, empty caption."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS:
            text = path.with_suffix(".txt")
            yield (
                str(path),
                str(path.relative_to(folder)),
                text.read_text("utf-8").strip() if text.is_file() else "",
            )


def _table(path: Path, image_field: str | None, caption_field: str | None) -> Iterator[tuple[str, str, str]]:
    """(where, picture's path, caption) of each row of a table."""
    image = caption = None
    for where, row in _rows(path):
        image = image or _field(row, image_field, _IMAGE_FIELDS, where)
        caption = caption or _field(row, caption_field, _CAPTION_FIELDS, where)
        if not isinstance(row.get(image), str) or not isinstance(row.get(caption), (str, type(None))):
            raise DataError(f"{where}: '{image}' and '{caption}' must be texts.")
        yield where, row[image], (row.get(caption) or "").strip()


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}.{nearest(path.name, siblings)}")
    if path.suffix not in (".csv", ".tsv", ".jsonl"):
        raise DataError(f"{path}: captions are read from .csv, .tsv and .jsonl, not '{path.suffix}'.")
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix != ".jsonl":
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            yield from ((f"{path}, line {reader.line_num}", row) for row in reader)
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: not a JSON object.")
            yield f"{path}, line {number}", row


def _field(row: dict[str, Any], wanted: str | None, usual: tuple[str, ...], where: str) -> str:
    """The column to use: the one asked for, or the first usual one that the table has."""
    for name in (wanted,) if wanted else usual:
        if name in row:
            return name
    has = ", ".join(str(name) for name in row)
    names = f"'{wanted}'" if wanted else f"any of {', '.join(usual)}"
    raise DataError(f"{where}: no column {names}; there are {has}.{nearest(wanted or usual[0], map(str, row))}")
