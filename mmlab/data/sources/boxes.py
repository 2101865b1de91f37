"""Boxes in the forms of Pascal VOC (an XML file per image) and YOLO (a text file per image)."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mmlab.config.errors import DataError, existing_folder
from mmlab.data.building import Entry, Rows
from mmlab.data.formats import Members
from mmlab.data.sample_types import SampleError
from mmlab.data.sources.coco import Annotated, add_box, write_boxes
from mmlab.data.sources.files import lines, read_text
from mmlab.data.sources.pictures import ImageFolder, as_text, files_of, pictures_of
from mmlab.data.tally import Tally

DETAILS = ("captions", "boxes", "crowds", "flat")


def voc(
    images: str | Path, annotations: str | Path, listed: str | Path | None = None, missing_budget: float = 0.0
) -> Rows:
    """Read Pascal VOC's layout: `Annotations/x.xml` with the boxes of `JPEGImages/x.jpg`.

    Args:
        images: the image folder.
        annotations: the folder of XML files.
        listed: a text file with the names of the annotations to read, such as ImageSets/Main/train.txt; None: all.
        missing_budget: share of the images that may be missing or unsupported.

    Returns:
        A row for each annotation; details as `coco`. Left out: `xml`, `box`, `without text`, and what
        `ImageFolder.read` names.

    Raises:
        DataError: no such folder or file, no annotation, or a name in the list without one.
    """
    folder, root = ImageFolder(images), existing_folder(annotations)
    if listed is None:
        paths = [path for path in files_of(root) if path.suffix.lower() == ".xml" and not path.name.startswith(".")]
    else:
        names = [line.split()[0] for line in lines(Path(listed)) if line.strip()]
        paths = [root / f"{name}.xml" for name in names]
        if missing := next((path for path in paths if not path.is_file()), None):
            raise DataError(f"{listed} names {missing.stem}, and there is no {missing}.")
    if not paths:
        raise DataError(f"{root} has no .xml file with boxes.")
    entries = ((as_text(str(path)), path) for path in paths)
    return Rows(entries, partial(_convert, folder, _voc), Tally(*DETAILS), missing_budget)


def yolo(images: str | Path, names: str | Path, labels: str | Path | None = None, missing_budget: float = 0.0) -> Rows:
    """Read YOLO's layout: `labels/x.txt` with a line for each box of `images/x.jpg`.

    A line has the number of the class, and the center, width and height of the box as fractions of the image; or the
    points of a polygon, of which the box is kept.

    Args:
        images: the image folder.
        names: names of the classes: `data.yaml` with `names`, or a text file with one a line.
        labels: the folder of the text files; None: `labels` in place of the last `images` in the path.
        missing_budget: share of the images that may be unsupported.

    Returns:
        A row for each file of the image folder; details as `coco`. Left out: `box`, `without text` (an image without
        boxes), and what `ImageFolder.read` and `pictures_of` name.

    Raises:
        DataError: no such folder or file, no names of classes, or no text file at all.
    """
    folder, root = ImageFolder(images), Path(images).expanduser()
    places = root.parts
    if labels is None and "images" not in places:
        raise DataError(f"{images} has no folder 'images' in its path, beside which 'labels' would lie; give --labels.")
    if labels is None:
        at = len(places) - 1 - places[::-1].index("images")
        labels = Path(*places[:at], "labels", *places[at + 1 :])
        if not labels.is_dir():
            raise DataError(f"{images} has no folder {labels} beside it; give the folder of text files as --labels.")
    below, classes, tally = existing_folder(labels), _names(Path(names)), Tally(*DETAILS)
    if not any(path.suffix == ".txt" for path in files_of(below)):
        raise DataError(f"{below} has no .txt file with boxes.")

    def entries() -> Iterator[Entry]:
        for path in pictures_of(root, tally, {}):
            inside = path.relative_to(root)
            yield as_text(str(path)), (inside, below / inside.with_suffix(".txt"))

    return Rows(entries(), partial(_convert, folder, partial(_yolo, classes)), tally, missing_budget)


def _convert(folder: ImageFolder, read: Any, where: str, entry: Any, tally: Tally) -> tuple[str, Members] | None:
    """Make a sample of an image whose boxes a function reads."""
    try:
        annotated: Annotated = read(where, entry)
    except (SampleError, DataError) as error:
        reason = error.reason if isinstance(error, SampleError) else "box"
        tally.leave_out(reason, f"{where}: {str(error).removeprefix(where).lstrip(':, ')}")
        return None
    return write_boxes(folder, where, annotated, tally)


def _voc(where: str, path: Path) -> Annotated:
    try:
        root = ElementTree.fromstring(path.read_bytes())
        across, down = (float(root.findtext(f"size/{side}") or 0) for side in ("width", "height"))
        name = root.findtext("filename") or f"{path.stem}.jpg"
        picture = Annotated(where, name, across, down)
        for thing in root.iter("object"):
            corners = [float(thing.findtext(f"bndbox/{edge}") or "nan") for edge in ("xmin", "ymin", "xmax", "ymax")]
            if min(across, down) <= 0:
                raise SampleError("box", "It states no width and height of the image.")
            # Pixels count from 1, and the last one belongs to the box.
            left, top, right, bottom = corners[0] - 1, corners[1] - 1, corners[2], corners[3]
            box = [left / across, top / down, right / across, bottom / down]
            add_box(picture, thing.findtext("name"), box, where)
    except (ElementTree.ParseError, ValueError) as error:
        raise SampleError("xml", f"It does not parse: {error}.") from None
    return picture


def _yolo(classes: dict[int, str], where: str, entry: tuple[Path, Path]) -> Annotated:
    inside, text = entry
    picture = Annotated(where, str(inside))
    for line_number, line in enumerate(read_text(text).splitlines() if text.is_file() else (), 1):
        fields = line.split()
        if not fields:
            continue
        place = f"line {line_number} of {text.name}"
        try:
            number, values = int(fields[0]), [float(field) for field in fields[1:]]
        except ValueError:
            raise SampleError("box", f"{place}: expected numbers, not '{line[:60]}'.") from None
        if number not in classes:
            raise SampleError("box", f"{place}: class {number} has no name; there are {len(classes)}.")
        if len(values) == 4:
            x, y, width, height = values
            edges = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        elif len(values) >= 6 and len(values) % 2 == 0:
            xs, ys = values[::2], values[1::2]
            edges = [min(xs), min(ys), max(xs), max(ys)]
        else:
            raise SampleError("box", f"{place}: expected a class and four numbers, or a polygon, not '{line[:60]}'.")
        if not all(map(math.isfinite, edges)):
            raise SampleError("box", f"{place}: a number is not finite.")
        add_box(picture, classes[number], edges, place)
    return picture


def _names(path: Path) -> dict[int, str]:
    """Number → name of each class."""
    text = read_text(path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        return dict(enumerate(line.strip() for line in text.splitlines() if line.strip()))
    import yaml

    try:
        content = yaml.safe_load(text)
        names = content["names"]
        numbered = dict(enumerate(names)) if isinstance(names, list) else {int(n): name for n, name in names.items()}
        return {number: str(name) for number, name in numbered.items()}
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{path} has no 'names' of classes, a list or number: name.") from None
