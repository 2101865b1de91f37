import json
from pathlib import Path

import pytest

from mmlab.config.errors import DataError
from mmlab.data.sources.boxes import voc, yolo
from tests.tiny_builds import built
from tests.tiny_files import png


def annotation(name: str, *things: tuple, width=10, height=20) -> str:
    boxes = "".join(
        f"<object><name>{kind}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        "</bndbox></object>"
        for kind, x1, y1, x2, y2 in things
    )
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    return f"<annotation><filename>{name}</filename>{size}{boxes}</annotation>"


@pytest.fixture
def folder(tmp_path):
    for name in ("JPEGImages/a.png", "JPEGImages/b.png", "images/train/a.png", "images/train/sub/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    for name in ("Annotations", "labels/train/sub"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def records(index) -> list[dict]:
    return [json.loads(index.read(i)["json"]) for i in range(len(index))]


def build_voc(folder: Path, files: dict[str, str], **options):
    for name, text in files.items():
        (folder / "Annotations" / name).write_text(text)
    return built(voc(folder / "JPEGImages", folder / "Annotations", **options), folder / "out")


def test_voc_counts_pixels_from_one(folder):
    things = ("cat", 1, 1, 10, 20), ("dog", 6, 11, 10, 20)
    index, tally = build_voc(folder, {"a.xml": annotation("a.png", *things), "b.xml": annotation("b.png")})
    boxes = [{"category": "cat", "box": [0.0, 0.0, 1.0, 1.0]}, {"category": "dog", "box": [0.5, 0.5, 1.0, 1.0]}]
    assert records(index) == [{"id": "a", "image": "a.png", "boxes": boxes}]
    assert tally.counts() == {
        **{"rows": 2, "samples": 1, "without text": 1, "captions": 0, "boxes": 2, "crowds": 0, "flat": 0},
    }
    assert index.read(0)["png"] == png()


def test_voc_reads_a_list_of_names(folder):
    (folder / "train.txt").write_text("b 1\n")
    files = {f"{name}.xml": annotation(f"{name}.png", ("cat", 1, 1, 5, 5)) for name in "ab"}
    index, _ = build_voc(folder, files, listed=folder / "train.txt")
    assert list(index.keys) == ["b"]
    (folder / "train.txt").write_text("c\n")
    with pytest.raises(DataError, match=r"train\.txt names c, and there is no .*c\.xml"):
        build_voc(folder, files, listed=folder / "train.txt")


@pytest.mark.parametrize(
    ("text", "reason", "message"),
    [
        ("<annotation>", "xml", "does not parse"),
        (annotation("a.png", ("cat", "x", 1, 5, 5)), "xml", "could not convert"),
        (annotation("a.png", ("cat", "", 1, 5, 5)), "box", "not four fractions"),
        (annotation("a.png", ("cat", 1, 1, 500, 5)), "box", "not four fractions"),
        (annotation("a.png", (" ", 1, 1, 5, 5)), "box", "its category has no name"),
        (annotation("a.png", ("cat", 1, 1, 5, 5), width=0), "box", "no width and height"),
        (annotation("c.png", ("cat", 1, 1, 5, 5)), "missing", "is not in"),
    ],
)
def test_a_broken_annotation_is_left_out(folder, text, reason, message):
    good = {"b.xml": annotation("b.png", ("cat", 1, 1, 5, 5))}
    index, tally = build_voc(folder, {"a.xml": text, **good}, missing_budget=0.5)
    assert tally.left_out == {reason: 1} and len(index) == 1
    assert message in tally.examples[reason] and tally.examples[reason].count("a.xml") == 1


def build_yolo(folder: Path, files: dict[str, str], names: str = "cat\ndog\n", **options):
    for name, text in files.items():
        (folder / "labels/train" / name).write_text(text)
    path = folder / ("data.yaml" if ":" in names else "classes.txt")
    path.write_text(names)
    return built(yolo(folder / "images/train", path, **options), folder / "out")


@pytest.mark.parametrize("names", ["cat\ndog\n", "names: [cat, dog]\n", "nc: 2\nnames:\n  0: cat\n  1: dog\n"])
def test_yolo_boxes_and_polygons(folder, names):
    files = {"a.txt": "1 0.5 0.5 1.0 1.0\n\n0 0.1 0.2 0.3 0.2 0.3 0.6\n", "sub/b.txt": "0 0.25 0.25 0.5 0.5"}
    index, tally = build_yolo(folder, files, names)
    boxes = [{"category": "dog", "box": [0.0, 0.0, 1.0, 1.0]}, {"category": "cat", "box": [0.1, 0.2, 0.3, 0.6]}]
    assert records(index)[0] == {"id": "a", "image": "a.png", "boxes": boxes}
    assert list(index.keys) == ["a", "sub_b"] and tally.details["boxes"] == 3


@pytest.mark.parametrize(
    ("text", "reason", "message"),
    [
        ("2 0.5 0.5 1 1", "box", "line 1 of a.txt: class 2 has no name; there are 2"),
        ("0 0.5 0.5 1", "box", "expected a class and four numbers"),
        ("cat 0.5 0.5 1 1", "box", "expected numbers, not 'cat"),
        ("0 nan 0.5 1 1", "box", "not finite"),
        ("0 5 5 10 10", "box", "not four fractions"),
        ("", "without text", "neither captions nor boxes"),
    ],
)
def test_a_broken_label_is_left_out(folder, text, reason, message):
    index, tally = build_yolo(folder, {"a.txt": text, "sub/b.txt": "0 0.25 0.25 0.5 0.5"})
    assert tally.left_out == {reason: 1} and len(index) == 1 and message in tally.examples[reason]


def test_folders_without_boxes_are_errors(folder):
    with pytest.raises(DataError, match=r"Annotations has no \.xml file"):
        build_voc(folder, {})
    with pytest.raises(DataError, match=r"has no \.txt file with boxes"):
        build_yolo(folder, {})
    with pytest.raises(DataError, match="no 'names' of classes"):
        build_yolo(folder, {"a.txt": "0 0.5 0.5 1 1"}, "nc: 2\n")
    with pytest.raises(DataError, match="give --labels"):
        yolo(folder / "JPEGImages", folder / "classes.txt")
    (folder / "labels").rename(folder / "labels-1")
    with pytest.raises(DataError, match=r"train has no folder .*labels/train beside it; give .* as --labels"):
        yolo(folder / "images/train", folder / "classes.txt")
    (folder / "labels-1").rename(folder / "labels")
    index, _ = built(yolo(folder / "JPEGImages", folder / "classes.txt", folder / "labels/train"), folder / "other")
    assert list(index.keys) == ["a"]
