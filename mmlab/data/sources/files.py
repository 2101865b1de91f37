"""Files of foreign data sets: image folders, JSON files and tables."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmlab.config.errors import DataError, nearest
from mmlab.data.formats import image_kind


class ImageFolder:
    """Reads the images that a data set names.

    Attributes:
        missing: images that were not there.
        unsupported: images that are neither JPEG nor PNG nor WebP, by their contents.
    """

    def __init__(self, root: str | Path, missing_budget: float, total: int):
        """
        Args:
            root: the folder.
            missing_budget: share of the `total` images that may be missing or unsupported.
            total: number of images that the data set names.

        Raises:
            DataError: there is no such folder.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"there is no image folder {self.root}.")
        self.missing = self.unsupported = 0
        self._allowed = int(missing_budget * total)

    def read(self, name: Any, where: str) -> tuple[str, bytes] | None:
        """Return extension and bytes of an image, or None (and count it) if it is missing or unsupported.

        Raises:
            DataError: naming `where`, for a path outside the folder, or more losses than the budget allows.
        """
        if not isinstance(name, str):
            raise DataError(f"{where}: an image is named by one path, not {type(name).__name__}.")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{where}: image '{name}' points outside {self.root}.")
        try:
            data = (self.root / name).read_bytes()
        except (OSError, ValueError):
            self.missing += 1
            return self._lose(f"{where}: image '{name}' is not in {self.root}")
        kind = image_kind(data)
        if kind is None:
            self.unsupported += 1
            return self._lose(f"{where}: image '{name}' is neither JPEG nor PNG nor WebP")
        return kind, data

    def _lose(self, why: str) -> None:
        lost = self.missing + self.unsupported
        if lost > self._allowed:
            raise DataError(f"{why} (missing or unsupported: {lost}, allowed: {self._allowed}).")


def existing(path: Path) -> Path:
    """The path of a file; raises DataError with the closest name in its folder if there is no such file."""
    if not path.is_file():
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}.{nearest(path.name, siblings)}")
    return path


def load_json(path: Path) -> Any:
    """The contents of a JSON file.

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
        DataError: no such file, another kind of file, or a line that is not a JSON object.
    """
    existing(path)
    if path.suffix not in (".csv", ".tsv", ".jsonl"):
        raise DataError(f"{path}: a table is a .csv, .tsv or .jsonl file, not '{path.suffix}'.")
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


def column(row: dict[str, Any], chosen: str | None, usual: Sequence[str], where: str) -> str:
    """The column `chosen`, or else the first of the `usual` ones that the table has.

    Raises:
        DataError: the table has none of them.
    """
    if (name := optional_column(row, chosen, usual, where)) is not None:
        return name
    raise DataError(
        f"{where}: none of the columns {', '.join(usual)}; there are {_names(row)}.{nearest(usual[0], map(str, row))}"
    )


def optional_column(row: dict[str, Any], chosen: str | None, usual: Sequence[str], where: str) -> str | None:
    """As `column`, but None if none is chosen and the table has no usual one.

    Raises:
        DataError: the table does not have the `chosen` one.
    """
    if chosen is None:
        return next((name for name in usual if name in row), None)
    if chosen not in row:
        raise DataError(f"{where}: no column '{chosen}'; there are {_names(row)}.{nearest(chosen, map(str, row))}")
    return chosen


def class_of(row: dict[str, Any], name: str | None, where: str) -> str | int | None:
    """A row's class, a name or a number; None without such a column or value.

    Raises:
        DataError: a value of another kind.
    """
    value = None if name is None else row.get(name)
    if isinstance(value, str):
        return value.strip() or None
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise DataError(f"{where}: '{name}' must be a class's name or number, not {value!r}.")


def _names(row: dict[str, Any]) -> str:
    return ", ".join(str(name) for name in row)
