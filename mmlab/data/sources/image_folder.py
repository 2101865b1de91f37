"""A folder of images with classes: one subfolder per class, or a table."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.formats import IMAGE_EXTENSIONS, MAP, KeyMaker, Members
from mmlab.data.shard_files import Samples
from mmlab.data.sources.files import CLASS_FIELDS, IMAGE_FIELDS, ImageFolder, class_of, column, rows


def images(
    root: str | Path,
    labels: str | Path | None = None,
    image_field: str | None = None,
    class_field: str | None = None,
    missing_budget: float = 0.0,
    maps: str | Path | None = None,
) -> Samples:
    """Read images and their classes.

    Args:
        root: the image folder. Without a table, an image's class is the first subfolder that it is in
            (`root/<class>/…/x.jpg`, the layout of torchvision's ImageFolder); images directly in `root` have none.
        labels: a `.csv`, `.tsv` or `.jsonl` file; each row has an image's path (in `root`) and its class. Only the
            images that it names are read.
        image_field: the column of the path; None: the first of `image`, `file`, `filename`, `path`, …
        class_field: the column of the class, a name or a number; None: `class` or `label`.
        missing_budget: share of the images that may be missing or unsupported, or whose map may be.
        maps: a folder with a PNG of the same path for each image, such as its segmentation; it becomes `map.png`.

    Returns:
        Counts: `samples`, `classes`, `without_class`, `missing` (no such image), `unsupported` (not JPEG, PNG or
        WebP).

    Raises:
        ConfigError: columns are named without a table.
        DataError: no such folder or table, a malformed row (with its number), no image, or more losses than the
            budget allows.
    """
    if labels is None and (image_field or class_field):
        raise ConfigError(f"the column '{image_field or class_field}' is named without a table; give --labels TABLE.")
    entries = list(_folders(Path(root)) if labels is None else _table(Path(labels), image_field, class_field))
    folder = ImageFolder(root, missing_budget, len(entries))
    if not entries:
        raise DataError(f"{labels or root} has no images ({', '.join(IMAGE_EXTENSIONS)}).")
    map_folder = None if maps is None else ImageFolder(maps, missing_budget, len(entries))
    keys, classes = KeyMaker(), set()
    counts = {"samples": 0, "without_class": 0}
    for where, name, kind in entries:
        picture = folder.read(name, where)
        members: Members = {} if picture is None else {picture[0]: picture[1]}
        if picture is not None and map_folder is not None:
            drawn = map_folder.read(str(Path(name).with_suffix(".png")), where)
            if drawn is not None and drawn[0] != "png":
                raise DataError(f"{where}: the contents of its map are {drawn[0]}; maps are PNG, which is lossless.")
            members = {} if drawn is None else {**members, MAP: drawn[1]}
        if not members:
            continue
        counts["samples"] += 1
        record: dict[str, Any] = {"id": name}
        if kind is None:
            counts["without_class"] += 1
        else:
            record["class"] = kind
            classes.add(kind)
        yield keys(str(Path(name).with_suffix(""))), {**members, "json": record}
    lost = [folder] if map_folder is None else [folder, map_folder]
    missing, unsupported = sum(one.missing for one in lost), sum(one.unsupported for one in lost)
    return {**counts, "classes": len(classes), "missing": missing, "unsupported": unsupported}


def _folders(root: Path) -> Iterator[tuple[str, str, str | int | None]]:
    """(where, path from the folder, class) of each image."""
    for path in sorted(root.rglob("*")):
        if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS:
            name = path.relative_to(root)
            yield str(path), str(name), name.parts[0] if len(name.parts) > 1 else None


def _table(path: Path, image_field: str | None, class_field: str | None) -> Iterator[tuple[str, str, str | int | None]]:
    """(where, path from the folder, class) of each row."""
    image = kind = None
    for where, row in rows(path):
        if image is None or kind is None:
            image = column(row, image_field, IMAGE_FIELDS, where)
            kind = column(row, class_field, CLASS_FIELDS, where)
        if not isinstance(row.get(image), str):
            raise DataError(f"{where}: '{image}' must be text.")
        yield where, row[image], class_of(row, kind, where)
