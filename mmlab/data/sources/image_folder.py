"""A folder of images with classes: one subfolder per class, or a table."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.building import Rows
from mmlab.data.dialogues import check_sample
from mmlab.data.formats import MAP, Members
from mmlab.data.sample_types import SampleError
from mmlab.data.sources.pictures import ImageFolder, pictures_of
from mmlab.data.sources.tables import CLASS_FIELDS, IMAGE_FIELDS, Row, class_of, column, rows
from mmlab.data.tally import Tally

_Entry = tuple[Any, Row, str]
"""An image's path in the folder, and the row and column of its class."""


def images(
    root: str | Path,
    labels: str | Path | None = None,
    image_field: str | None = None,
    class_field: str | None = None,
    missing_budget: float = 0.0,
    maps: str | Path | None = None,
) -> Rows:
    """Read images and their classes.

    Args:
        root: the image folder. Without a table, an image's class is the first subfolder that it is in
            (`root/<class>/…/x.jpg`, the layout of torchvision's ImageFolder); images directly in `root` have none.
        labels: a `.csv`, `.tsv`, `.jsonl` or `.json` file; each row has an image's path (in `root`) and its class.
            Only the images that it names are read.
        image_field: the column of the path; None: the first of `image`, `file`, `filename`, `path`, …
        class_field: the column of the class, a name or a number; None: `class` or `label`.
        missing_budget: share of the images that may be missing or unsupported, or whose map may be.
        maps: a folder with a PNG of the same path for each image, such as its segmentation; it becomes `map.png`.

    Returns:
        A row for each row of the table, or for each file of the folder; `classes` and `without_class` of those that are
        written. Left out: `map` (not a PNG), and what `ImageFolder.read`, `rows`, `class_of` and `pictures_of` name.

    Raises:
        ConfigError: columns are named without a table.
        DataError: no such folder or table, another encoding, quotation marks that do not match (with the line), no
            image, or more lost images than the budget allows.
    """
    if labels is None and (image_field or class_field):
        raise ConfigError(f"the column '{image_field or class_field}' is named without a table; give --labels TABLE.")
    tally, folder = Tally("without_class", "classes"), ImageFolder(root)
    map_folder = None if maps is None else ImageFolder(maps)
    if labels is None:
        entries = _folders(Path(root), tally)
    else:
        entries = _table(Path(labels), tally, Path(root), image_field, class_field)

    def convert(where: str, entry: _Entry, tally: Tally) -> tuple[str, Members] | None:
        name, row, column_of_class = entry
        with tally.row(where):
            picture = folder.read(name, where, tally)
            members: Members = {picture.extension: picture.data}
            plain = Path(picture.name).with_suffix("")
            if map_folder is not None:
                drawn = map_folder.read(str(plain.with_suffix(".png")), where, tally)
                if drawn.extension != "png":
                    raise SampleError("map", f"The contents of its map are {drawn.extension}; maps are PNG.")
                members[MAP] = drawn.data
            record: dict[str, Any] = {"id": picture.name}
            kind = class_of(row, column_of_class)
            if kind is not None:
                record["class"] = kind
            check_sample(record, (), 1)
            tally.details["without_class"] += kind is None
            if kind is not None:
                tally.note("classes", str(kind))
            return str(plain), {**members, "json": record}

    def finish(tally: Tally) -> None:
        if not tally.rows:
            raise DataError(f"{labels or root} has no images.")

    return Rows(entries, convert, tally, missing_budget, finish=finish)


def _folders(root: Path, tally: Tally) -> Iterator[tuple[str, _Entry]]:
    """Each image, with its first subfolder as the row of its class."""
    for path in pictures_of(root, tally):
        name = path.relative_to(root)
        yield str(path), (str(name), {"class": name.parts[0] if len(name.parts) > 1 else None}, "class")


def _table(
    path: Path, tally: Tally, images: Path, image_field: str | None, class_field: str | None
) -> Iterator[tuple[str, _Entry]]:
    image = kind = None
    for where, row in rows(path, tally, images):
        if image is None or kind is None:
            image = column(row, image_field, IMAGE_FIELDS, where)
            kind = column(row, class_field, CLASS_FIELDS, where)
        yield where, (row.get(image), row, kind)
