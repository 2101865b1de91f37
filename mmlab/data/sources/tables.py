"""Tables of foreign data sets: CSV, TSV, JSON and JSON lines.

A row that does not fit the header is left out and counted, never joined with another one. What a quotation mark means
depends on the format alone: in a `.tsv` it is text, as in Conceptual Captions; a `.csv` follows RFC 4180.
"""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from mmlab.config.errors import DataError, existing_file, nearest
from mmlab.data.sample_types import SampleError
from mmlab.data.sources.files import lines, load_entries
from mmlab.data.sources.pictures import PICTURE_SUFFIXES, READ_SUFFIXES
from mmlab.data.tally import Tally

IMAGE_FIELDS = ("image", "file", "filename", "file_name", "image_path", "path", "image_id")
CLASS_FIELDS = ("class", "label")
_JSON = (".jsonl", ".ndjson", ".json")
_LONGEST = 1 << 24  # characters of a field; more of them are a quotation mark that is never closed

Row = dict[str, Any]


def rows(path: Path, tally: Tally, images: Path | None = None) -> Iterator[tuple[str, Row]]:
    """(where, row) of each row of a `.csv`, `.tsv`, `.jsonl` or `.json` file; `where` names file and line.

    Args:
        path: the table, in UTF-8, UTF-16 or UTF-32.
        tally: counts the rows that are left out: `fields` (another number than the header has), `nul`, `json`.
        images: folder of the images that the rows name, which helps to find quotation marks that do not match.

    Raises:
        DataError: no such file, another kind of file or encoding, no row, a column twice, or quotation marks of a
            `.csv` that do not match (all that follows could be misread).
    """
    existing_file(path)
    suffix = path.suffix.lower()
    if suffix in _JSON:
        for where, row in load_entries(path, tally):
            if isinstance(row, dict):
                yield where, row
            else:
                tally.leave_out("json", f"{where}: not a JSON object.")
        return
    if suffix not in (".csv", ".tsv"):
        raise DataError(f"{path}: a table is a .csv, .tsv, .jsonl or .json file, not '{path.suffix}'.")
    table = _csv(path, tally, images) if suffix == ".csv" else _tsv(path)
    header = _header(next(table, (1, [])), path)
    number = None
    for number, fields in table:
        where = f"{path}, line {number}"
        if any("\0" in field for field in fields):
            tally.leave_out("nul", f"{where}: A field has a NUL character.")
        elif len(fields) != len(header):
            hint = " A comma in a text needs quotation marks around the field." if suffix == ".csv" else ""
            tally.leave_out("fields", f"{where}: It has {len(fields)} fields, the header {len(header)}.{hint}")
        else:
            if suffix == ".tsv" and any(len(field) > 1 and field[0] == field[-1] == '"' for field in fields):
                tally.details["fields_in_quotation_marks"] += 1  # a program may have quoted them; the marks are kept
            yield where, dict(zip(header, fields, strict=True))
    if number is None:
        raise DataError(f"{path} has no row below its header: {', '.join(header)}.")


def _header(line: tuple[int, list[str]], path: Path) -> list[str]:
    """The names of the columns."""
    number, fields = line
    header = [name.strip() for name in fields]
    if not header:
        raise DataError(f"{path} is empty.")
    if twice := next((name for name in header if name and header.count(name) > 1), None):
        raise DataError(f"{path}, line {number}: the column '{twice}' is there twice.")
    between = "commas" if path.suffix.lower() == ".csv" else "tabs"
    if len(header) == 1 and any(mark in header[0] for mark in ",;\t|"):
        raise DataError(
            f"{path}, line {number}: '{header[0]}' is one column; {between} separate those of a {path.suffix}."
        )
    return header


def _tsv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of each line that is not empty."""
    for number, line in enumerate(lines(path, "\n"), 1):
        if line := line.removesuffix("\n").removesuffix("\r"):
            yield number, line.split("\t")


def _csv(path: Path, tally: Tally, images: Path | None) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of each row that is not empty; a field in quotation marks may have several lines."""
    csv.field_size_limit(_LONGEST)
    raw: list[str] = []

    def recorded() -> Iterator[str]:
        for line in lines(path, ""):
            raw.append(line)
            yield line

    reader = csv.reader(recorded(), strict=True)
    while True:
        first = reader.line_num + 1
        raw.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f'{path}, line {first}: its quotation marks do not follow RFC 4180 ({error}); a field with " in it is '
                'written "…""…".'
            ) from None
        if len(raw) > 1:
            _check_one_row(raw, len(fields), images, f"{path}, lines {first} to {reader.line_num}")
            tally.details["rows_of_several_lines"] += 1
        if fields:
            yield first, fields


def _check_one_row(raw: Sequence[str], width: int, images: Path | None, where: str) -> None:
    """Raise DataError if each line of a row would be a row that names an image: a quotation mark is not closed."""

    def names_image(field: str) -> bool:
        name = field.strip('" ')
        if PurePath(name).suffix.lower() in PICTURE_SUFFIXES:
            return True
        files = () if images is None or not name else (Path(images, name + ending) for ending in READ_SUFFIXES)
        return any(os.path.isfile(file) for file in files)

    alone = [line.rstrip("\r\n").split(",") for line in raw]
    if all(len(fields) == width for fields in alone) and any(
        all(map(names_image, values)) for values in zip(*alone, strict=True)
    ):
        raise DataError(
            f"{where}: by their quotation marks they are one row, but each names an image; "
            'a field with " in it is written "…""…".'
        )


def column(row: Row, chosen: str | None, usual: Sequence[str], where: str) -> str:
    """The column `chosen`, or else the first of the `usual` ones that the table has.

    Raises:
        DataError: the table has none of them.
    """
    if (name := optional_column(row, chosen, usual, where)) is not None:
        return name
    raise DataError(
        f"{where}: none of the columns {', '.join(usual)}; there are {_names(row)}.{nearest(usual[0], map(str, row))}"
    )


def optional_column(row: Row, chosen: str | None, usual: Sequence[str], where: str) -> str | None:
    """As `column`, but None if none is chosen and the table has no usual one.

    Raises:
        DataError: the table does not have the `chosen` one.
    """
    if chosen is None:
        return next((name for name in usual if name in row), None)
    if chosen not in row:
        raise DataError(f"{where}: no column '{chosen}'; there are {_names(row)}.{nearest(chosen, map(str, row))}")
    return chosen


def class_of(row: Row, name: str | None) -> str | int | None:
    """A row's class, a name or a number; None without such a column or value.

    Raises:
        SampleError: `class` for a value of another kind.
    """
    value = None if name is None else row.get(name)
    if isinstance(value, str):
        return value.strip() or None
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise SampleError("class", f"'{name}' must be a class's name or number, not {value!r}.")


def _names(row: Row) -> str:
    return ", ".join(str(name) for name in row)
