import json

import pytest

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.sources.coco import coco
from tests.tiny_builds import built
from tests.tiny_files import png

IMAGES = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 200, "height": 100} for i in (7, 8, 9)]
CAPTIONS = {
    "images": IMAGES,
    "annotations": [
        {"image_id": 7, "caption": "A cat. "},
        {"image_id": 7, "caption": ""},
        {"image_id": 8, "caption": "B"},
    ],
}
INSTANCES = {
    "images": IMAGES[::2],
    "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "traffic light"}],
    "annotations": [
        {"image_id": 7, "category_id": 5, "bbox": [20, 10, 100.5, 40], "iscrowd": 0},
        {"image_id": 7, "category_id": 3, "bbox": [150, 50, 51, 50]},  # a pixel too far
        {"image_id": 7, "category_id": 3, "bbox": [0, 0, 10, 10], "iscrowd": 1},
        {"image_id": 7, "category_id": 3, "bbox": [5, 5, 0, 10]},
    ],
}


@pytest.fixture
def make(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for image in IMAGES:
        (folder / image["file_name"]).write_bytes(png())

    def build(pictures=True, missing_budget=0.0, **files):
        for name, content in files.items():
            path = tmp_path / f"{name}.{'jsonl' if name == 'table' else 'json'}"
            path.write_text(content if isinstance(content, str) else json.dumps(content))
            files[name] = path
        samples = coco(folder if pictures else None, **files, missing_budget=missing_budget)
        index, tally = built(samples, tmp_path / "out")
        records = {str(key): json.loads(index.read(i)["json"]) for i, key in enumerate(index.keys)}
        return records, index, tally.counts()

    return build


def test_captions_and_boxes_meet_by_the_image(make):
    records, index, counts = make(captions=CAPTIONS, instances=INSTANCES)
    boxes = [
        {"category": "traffic light", "box": [0.1, 0.1, 0.6025, 0.5]},
        {"category": "cat", "box": [0.75, 0.5, 1.0, 1.0]},
    ]
    assert records == {
        "000000000007": {"id": "000000000007", "image": "000000000007.jpg", "captions": ["A cat."], "boxes": boxes},
        "000000000008": {"id": "000000000008", "image": "000000000008.jpg", "captions": ["B"]},
    }
    assert index.read(0)["png"] == png()
    assert counts == {
        **{"rows": 3, "samples": 2, "without text": 1},
        **{"captions": 2, "boxes": 2, "crowds": 1, "flat": 1},
    }


def test_either_file_is_enough_and_images_may_be_elsewhere(make):
    records, index, counts = make(pictures=False, instances=INSTANCES)
    assert list(records) == ["000000000007"] and index.extensions(0) == ["json"] and "missing" not in counts
    assert list(make(captions=CAPTIONS)[0]) == ["000000000007", "000000000008"]


def test_a_table_holds_both(make):
    lines = [
        {
            "id": "1",
            "image": "a/7.jpg",
            "captions": ["x"],
            "instances": [{"category": "cat", "bbox": [0, 0.1, 0.2, 1.0]}],
        },
        {"id": "2", "image": "8.jpg", "captions": []},
    ]
    records, _, counts = make(pictures=False, table="\n".join(map(json.dumps, lines)))
    boxes = [{"category": "cat", "box": [0.0, 0.1, 0.2, 1.0]}]
    assert records == {"a_7": {"id": "7", "image": "a/7.jpg", "captions": ["x"], "boxes": boxes}}
    assert counts["without text"] == 1


def test_missing_images_have_a_budget(make, tmp_path):
    (tmp_path / "photos" / IMAGES[0]["file_name"]).unlink()
    records, _, counts = make(captions=CAPTIONS, missing_budget=0.4)
    assert list(records) == ["000000000008"] and counts["missing"] == 1
    with pytest.raises(DataError, match=r"image 0: image '000000000007.jpg' is not in"):
        make(captions=CAPTIONS)


def changed(number: int, **fields):
    notes = [{**note, **fields} if i == number else note for i, note in enumerate(INSTANCES["annotations"])]
    return {"instances": {**INSTANCES, "annotations": notes}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"captions": "{"}, "captions.json is not JSON"),
        ({"captions": [1]}, "does not have COCO's format"),
        ({"instances": CAPTIONS}, 'has no list of "categories"'),
        (changed(1, image_id=8), "annotation 1: expected an object whose image_id"),
        (changed(0, category_id=4), "annotation 0: its category has no name"),
        (changed(0, bbox=[1, 2, 3]), r"annotation 0: bbox must be four numbers, not \[1, 2, 3\]"),
        (changed(0, bbox=[1, 2, 3, True]), "bbox must be four numbers"),
        (changed(0, bbox=[0, 0, 500, 50]), "is not four fractions"),
        ({"captions": {**CAPTIONS, "annotations": [{"image_id": 7, "caption": 5}]}}, "a caption must be text"),
        ({"captions": {**CAPTIONS, "images": [{"id": 7}]}}, "image 0: expected"),
        ({"captions": CAPTIONS, "instances": {**INSTANCES, "images": [{**IMAGES[0], "id": 9}]}}, "'000000000009.jpg'"),
        ({"instances": {**INSTANCES, "images": [{**IMAGES[0], "width": 0}, IMAGES[2]]}}, "no width and height"),
        ({"table": '{"imgae": "a.jpg"}'}, "line 1: 'image' must name an image. Did you mean 'imgae'?"),
        ({"table": '{"image": "a", "instances": [{"category": "c", "bbox": [0, 0, 40, 30]}]}'}, "not four fractions"),
        ({"table": '{"image": "a", "instances": [3]}'}, "an instance must be"),
    ],
)
def test_malformed_files_are_errors(make, files, message):
    with pytest.raises(DataError, match=message):
        make(**files)


def test_files_are_required(make):
    for files in ({}, {"captions": CAPTIONS, "table": "{}"}):
        with pytest.raises(ConfigError, match="or a table instead"):
            make(**files)
