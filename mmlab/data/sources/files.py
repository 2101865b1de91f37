"""Files of foreign data sets: picture folders, JSON files and tables, checked before they are read."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmlab.config.errors import DataError, nearest
from mmlab.data.formats import picture_kind


class PictureFolder:
    """Reads the pictures that a data set names.

    Attributes:
        missing: pictures that were not there.
        unsupported: pictures that are neither JPEG nor PNG nor WebP, whatever they are called.
    """

    def __init__(self, root: str | Path, missing_budget: float, total: int):
        """
        Args:
            root: the folder.
            missing_budget: share of the `total` pictures that may be missing or unsupported.
            total: how many will be asked for.

        Raises:
            DataError: there is no such folder.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"there is no picture folder {self.root}.")
        self.missing = self.unsupported = 0
        self._allowed = int(missing_budget * total)

    def read(self, name: Any, where: str) -> tuple[str, bytes] | None:
        """Return extension and bytes of a picture, or None (counted) if it cannot be had.

        Raises:
            DataError: naming `where`, for a path that leaves the folder, or losses beyond the budget.
        """
        if not isinstance(name, str):
            raise DataError(f"{where}: a picture is named by one path, not {type(name).__name__}.")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{where}: picture '{name}' points outside {self.root}.")
        try:
            data = (self.root / name).read_bytes()
        except (OSError, ValueError):
            self.missing += 1
            return self._lose(f"{where}: picture '{name}' is not in {self.root}")
        kind = picture_kind(data)
        if kind is None:
            self.unsupported += 1
            return self._lose(f"{where}: picture '{name}' is neither JPEG nor PNG nor WebP")
        return kind, data

    def _lose(self, why: str) -> None:
        lost = self.missing + self.unsupported
        if lost > self._allowed:
            raise DataError(f"{why}; {lost} are lost and the missing budget allows {self._allowed}.")


def existing(path: Path) -> Path:
    """The path of a file; DataError with the nearest name beside it where there is none."""
    if not path.is_file():
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}.{nearest(path.name, siblings)}")
    return path


def load_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: there is no such file, it cannot be read, or it is not JSON.
    """
    try:
        return json.loads(existing(path).read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from None


IMAGE_FIELDS = ("image", "file", "filename", "file_name", "image_path", "path")
CLASS_FIELDS = ("class", "label")


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each row of a `.csv`, `.tsv` or `.jsonl` file; `where` names file and line.

    Raises:
        DataError: no such file, another kind of file, or a line that is no JSON object.
    """
    existing(path)
    if path.suffix not in (".csv", ".tsv", ".jsonl"):
        raise DataError(f"{path}: tables are read from .csv, .tsv and .jsonl, not '{path.suffix}'.")
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


def column(row: dict[str, Any], wanted: str | None, usual: Sequence[str], where: str) -> str:
    """The column to use: the one asked for, or the first usual one that the table has.

    Raises:
        DataError: the table has none of them.
    """
    if (found := optional_column(row, wanted, usual, where)) is not None:
        return found
    raise DataError(
        f"{where}: no column any of {', '.join(usual)}; there are {_names(row)}.{nearest(usual[0], map(str, row))}"
    )


def optional_column(row: dict[str, Any], wanted: str | None, usual: Sequence[str], where: str) -> str | None:
    """As `column`, but None where none was asked for and the table has no usual one.

    Raises:
        DataError: the table does not have the one that was asked for.
    """
    if wanted is None:
        return next((name for name in usual if name in row), None)
    if wanted not in row:
        raise DataError(f"{where}: no column '{wanted}'; there are {_names(row)}.{nearest(wanted, map(str, row))}")
    return wanted


def class_of(row: dict[str, Any], name: str | None, where: str) -> str | int | None:
    """A row's class: a name or a number; None where there is no such column or the field is empty.

    Raises:
        DataError: something else.
    """
    value = None if name is None else row.get(name)
    if isinstance(value, str):
        return value.strip() or None
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise DataError(f"{where}: '{name}' must be a class's name or number, not {value!r}.")


def _names(row: dict[str, Any]) -> str:
    return ", ".join(str(name) for name in row)
