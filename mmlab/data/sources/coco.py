"""COCO's format: captions and boxes in JSON files or in a table, and a folder with the images."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, DataError, nearest
from mmlab.data.building import Rows
from mmlab.data.dialogues import check_sample
from mmlab.data.formats import Members
from mmlab.data.sample_types import SampleError
from mmlab.data.sources.files import load_json
from mmlab.data.sources.pictures import ImageFolder, as_text
from mmlab.data.sources.tables import rows
from mmlab.data.tally import Tally

_SLACK = 0.01  # how far a box may extend beyond its image; annotators' boxes often do by a pixel


@dataclass
class Annotated:
    """An image with its annotations; boxes are x1, y1, x2, y2 as fractions of width and height."""

    where: str
    name: str
    width: float = 0
    height: float = 0
    captions: list[str] = field(default_factory=list)
    boxes: list[dict[str, Any]] = field(default_factory=list)
    crowds: int = 0
    flat: int = 0


def coco(
    images: str | Path | None,
    captions: str | Path | None = None,
    instances: str | Path | None = None,
    table: str | Path | None = None,
    missing_budget: float = 0.0,
) -> Rows:
    """Read images with their `captions` and `boxes`; images with neither are skipped.

    Args:
        images: the image folder; None makes samples of only texts and boxes.
        captions: such as captions_train2017.json.
        instances: such as instances_train2017.json.
        table: a `.jsonl` file in place of both; each line has the `image`, `captions` and `instances` (`category`, and
            `bbox` as fractions of width and height) of one image.
        missing_budget: share of the images that may be missing or unsupported.

    Returns:
        A row for each image; `captions`, `boxes`, and boxes of these images that are skipped, `crowds` (around groups)
        and `flat` (without area). Left out: `without text` (neither captions nor boxes), and what
        `ImageFolder.read` and `rows` name.

    Raises:
        ConfigError: no file, or both a table and JSON files.
        DataError: a file of another format, a malformed entry (with its position), or more losses than the budget
            allows.
    """
    if (table is None) == (captions is None and instances is None):
        raise ConfigError("give captions, instances or both as COCO's JSON files, or a table instead.")
    tally = Tally("captions", "boxes", "crowds", "flat")
    pictures = _table(Path(table), tally) if table else iter(_annotations(captions, instances))
    folder = None if images is None else ImageFolder(images)
    return Rows(((picture.where, picture) for picture in pictures), partial(write_boxes, folder), tally, missing_budget)


def write_boxes(folder: ImageFolder | None, where: str, picture: Annotated, tally: Tally) -> tuple[str, Members] | None:
    """Make a sample of an image with captions and boxes; without a folder it has no image."""
    with tally.row(where):
        if not picture.captions and not picture.boxes:
            raise SampleError("without text", "It has neither captions nor boxes.")
        read = folder.read(picture.name, where, tally) if folder else None
        name = as_text(picture.name) if read is None else read.name
        record: dict[str, Any] = {"id": Path(name).stem, "image": name}
        record |= {"captions": picture.captions} if picture.captions else {}
        record |= {"boxes": picture.boxes} if picture.boxes else {}
        check_sample(record, ["caption"] if picture.captions else [], int(read is not None))
        members: Members = {"json": record} if read is None else {read.extension: read.data, "json": record}
        tally.details.update(captions=len(picture.captions), boxes=len(picture.boxes))
        tally.details.update(crowds=picture.crowds, flat=picture.flat)
        return str(Path(name).with_suffix("")), members


def _annotations(captions: Any, instances: Any) -> list[Annotated]:
    """The images that either file lists, in their order."""
    pictures: dict[Any, Annotated] = {}
    for path in (captions, instances):
        if path is None:
            continue
        content = _load(Path(path))
        _list_pictures(content["images"], str(path), pictures)
        names = _categories(content, str(path)) if path is instances else {}
        for number, note in enumerate(content["annotations"]):
            where = f"{path}, annotation {number}"
            if not isinstance(note, dict) or note.get("image_id") not in pictures:
                raise DataError(f"{where}: expected an object whose image_id is one of the file's images.")
            picture = pictures[note["image_id"]]
            if path is captions:
                picture.captions += _captions([note.get("caption")], where)
            elif note.get("iscrowd"):
                picture.crowds += 1
            else:
                add_box(picture, names.get(note.get("category_id")), _shares(note.get("bbox"), picture, where), where)
    return list(pictures.values())


def _list_pictures(entries: list[Any], path: str, pictures: dict[Any, Annotated]) -> None:
    """Add a file's images to those of another, by their ids."""
    for number, entry in enumerate(entries):
        where = f"{path}, image {number}"
        name, key = (entry.get("file_name"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not name or not isinstance(key, int | str):
            raise DataError(f'{where}: expected {{"id": …, "file_name": text, "width": …, "height": …}}.')
        picture = pictures.setdefault(key, Annotated(where, name))
        if picture.name != name:
            raise DataError(f"{where}: id {key} is '{name}' here, but '{picture.name}' elsewhere.")
        picture.width, picture.height = (entry.get(side) or 0 for side in ("width", "height"))


def _table(path: Path, tally: Tally) -> Iterator[Annotated]:
    for where, row in rows(path, tally):
        name = row.get("image")
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: 'image' must name an image.{nearest('image', map(str, row))}")
        picture = Annotated(where, name, captions=_captions(row.get("captions") or [], where))
        for box in row.get("instances") or []:
            if not isinstance(box, dict):
                raise DataError(f'{where}: an instance must be {{"category": text, "bbox": four fractions}}.')
            add_box(picture, box.get("category"), box.get("bbox"), where)
        yield picture


def add_box(picture: Annotated, category: Any, box: Any, where: str) -> None:
    """Add a box; one without area is only counted."""
    if not isinstance(category, str) or not category.strip():
        raise DataError(f"{where}: its category has no name.")
    if not _numbers(box) or not all(-_SLACK <= edge <= 1 + _SLACK for edge in box):
        raise DataError(f"{where}: box {box!r} is not four fractions of the image's width and height.")
    edges = [round(min(max(float(edge), 0.0), 1.0), 4) for edge in box]
    if edges[0] < edges[2] and edges[1] < edges[3]:
        picture.boxes.append({"category": category.strip(), "box": edges})
    else:
        picture.flat += 1


def _shares(box: Any, picture: Annotated, where: str) -> list[float]:
    """COCO's x, y, width, height in pixels as x1, y1, x2, y2 in fractions."""
    if not _numbers(box):
        raise DataError(f"{where}: bbox must be four numbers, not {box!r}.")
    sides = picture.width, picture.height
    if not all(isinstance(side, int | float) and side > 0 for side in sides):
        raise DataError(f"{where}: the image '{picture.name}' has no width and height.")
    x, y, width, height = box
    return [x / sides[0], y / sides[1], (x + width) / sides[0], (y + height) / sides[1]]


def _numbers(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(edge, int | float) and not isinstance(edge, bool) and isfinite(edge) for edge in box)
    )


def _captions(texts: Any, where: str) -> list[str]:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: a caption must be text.")
    return [text.strip() for text in texts if text.strip()]


def _categories(content: dict[str, Any], path: str) -> dict[Any, Any]:
    """id → name."""
    categories = content.get("categories")
    if not isinstance(categories, list) or not all(isinstance(kind, dict) for kind in categories):
        raise DataError(f'{path} has no list of "categories"; boxes are read from instances_….json.')
    return {kind.get("id"): kind.get("name") for kind in categories}


def _load(path: Path) -> dict[str, Any]:
    content = load_json(path)
    lists = [content.get(name) for name in ("images", "annotations")] if isinstance(content, dict) else [None]
    if not all(isinstance(one, list) for one in lists):
        raise DataError(
            f'{path} does not have COCO\'s format: an object with the lists "images" and "annotations" is expected.'
        )
    return content
