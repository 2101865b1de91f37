import json

import pytest

from mmlab.config.errors import DataError
from mmlab.data.shard_files import write_shards
from mmlab.data.sources.llava_json import llava_json
from tests.tiny_files import png

TURNS = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]


@pytest.fixture
def make(tmp_path):
    (tmp_path / "images" / "00").mkdir(parents=True)
    (tmp_path / "images" / "00" / "a.jpg").write_bytes(png())  # a PNG in all but name
    (tmp_path / "images" / "page.jpg").write_bytes(b"<html>404")

    def build(entries, **options):
        path = tmp_path / "chat.json"
        path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
        return write_shards(
            llava_json(path, tmp_path / "images", **options), tmp_path / "out", overwrite=True, quiet=True
        )

    return build


def test_images_texts_and_repeated_ids(make):
    entries = [
        {"id": "GCC/01.x", "image": "00/a.jpg", "conversations": TURNS},
        {"id": "GCC/01.x", "image": "00/a.jpg", "conversations": TURNS * 2},
        {"id": 7, "conversations": TURNS[1:], "model": "left out"},
    ]
    index, counts = make(entries)
    assert index.keys.tolist() == ["GCC_01_x", "GCC_01_x-1", "7"]
    assert counts == {"samples": 3, "text_only": 1, "missing": 0, "unsupported": 0, "renamed": 1}
    assert index.read(0)["png"] == png()
    assert json.loads(index.read(1)["json"]) == {"id": "GCC/01.x", "conversations": TURNS * 2}
    assert index.extensions(2) == ["json"]


def test_the_response_type_comes_from_the_entry_or_the_option(make):
    entries = [{"id": "a", "conversations": TURNS}, {"id": "b", "type": "detail_description", "conversations": TURNS}]
    index, _ = make(entries, kind="conversation")
    assert [index.type_of(i) for i in range(2)] == ["conversation", "detail_description"]
    assert json.loads(index.read(0)["json"])["type"] == "conversation"
    index, _ = make(entries)
    assert [index.type_of(i) for i in range(2)] == ["", "detail_description"]


def test_missing_images_are_counted_within_the_budget(make):
    good = {"id": "a", "image": "00/a.jpg", "conversations": TURNS}
    entries = [good, {**good, "image": "00/b.jpg"}, {**good, "image": "page.jpg"}, good]
    index, counts = make(entries, missing_budget=0.5)
    assert len(index) == 2 and counts["missing"] == 1 and counts["unsupported"] == 1
    with pytest.raises(DataError, match=r"entry 2: image 'page\.jpg' is neither.*unsupported: 2, allowed: 1"):
        make(entries, missing_budget=0.3)
    with pytest.raises(DataError, match=r"entry 1: image '00/b\.jpg' is not in"):
        make(entries)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{", "is not JSON"),
        ({"a": 1}, "does not have LLaVA's format"),
        ([], "does not have LLaVA's format"),
        ([{"id": "a", "conversations": TURNS}, "text"], "entry 1: expected an object"),
        ([{"id": "a"}], "entry 0: expected an object with a non-empty list"),
        ([{"id": "a", "conversations": [{"from": "human"}]}], "entry 0, turn 0: expected"),
        (
            [{"id": "a", "conversations": [{"from": "gtp", "value": "x"}]}],
            "'gtp' is not a speaker.*mean 'gpt'",
        ),
        (
            [{"id": "a", "image": ["x", "y"], "conversations": TURNS}],
            "an image is named by one path",
        ),
        ([{"id": "a", "image": "../secret.png", "conversations": TURNS}], "points outside"),
        ([{"id": "a", "image": "/etc/passwd", "conversations": TURNS}], "points outside"),
    ],
)
def test_malformed_entries_are_errors(make, tmp_path, entries, message):
    with pytest.raises(DataError, match=message):
        make(entries)
    assert not (tmp_path / "out").exists()


def test_missing_file_has_a_hint(tmp_path):
    (tmp_path / "chat.json").write_text("[]")
    with pytest.raises(DataError, match=r"Did you mean 'chat\.json'"):
        next(llava_json(tmp_path / "chatt.json", tmp_path))
