import json

import pytest

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.sources.easy_vqa import easy_vqa, implied_by
from tests.tiny_builds import built
from tests.tiny_files import png

QUESTIONS = [
    ["what is the blue shape?", "circle", 0],
    ["is there a red shape?", "no", 0],
    ["is no teal shape present?", "no", 1],
    ["does the image not contain a circle?", "yes", 1],
    ["is there a black shape?", "no", 2],
    ["what shape is present?", "triangle", 3],
]


@pytest.fixture
def raw(tmp_path):
    for split in ("train", "test"):
        folder = tmp_path / "raw" / "easy_vqa" / "data" / split
        (folder / "images").mkdir(parents=True)
        for number in range(4):
            (folder / "images" / f"{number}.png").write_bytes(png())
        (folder / "questions.json").write_text(json.dumps(QUESTIONS))
    return tmp_path / "raw"


def keys(raw, *arguments) -> list[str]:
    return list(built(easy_vqa(raw, *arguments), raw.parent / "keys")[0].keys)


def test_an_image_with_its_questions_is_a_sample(raw, tmp_path):
    index, tally = built(easy_vqa(raw), tmp_path / "out")
    assert tally.counts() == {"rows": 4, "samples": 4, "questions": 6, "partial_caption": 2, "without_caption": 1}
    records = [json.loads(index.read(i)["json"]) for i in range(4)]
    assert [record.get("caption") for record in records] == [
        "a blue circle",
        "a teal shape",
        None,
        "a triangle",
    ]
    assert records[0]["questions"] == [
        {"question": "what is the blue shape?", "answer": "circle", "type": "shape"},
        {"question": "is there a red shape?", "answer": "no", "type": "yesno"},
    ]
    assert index.read(0)["png"] == png()


def test_splits(raw):
    assert keys(raw) == [f"train-0000{i}" for i in range(4)]
    assert keys(raw, "test", 2) == [f"test-0000{i}" for i in range(4)]
    assert keys(raw, "val", 2) == ["val-00000", "val-00002"]
    assert keys(raw, "train", 2) == ["train-00001", "train-00003"]
    assert keys(raw / "easy_vqa" / "data") == keys(raw)
    with pytest.raises(ConfigError, match="no val split of its own"):
        keys(raw, "val")
    with pytest.raises(ConfigError, match="Did you mean 'test'"):
        keys(raw, "tests")


@pytest.mark.parametrize(
    ("question", "answer", "implied"),
    [
        ("what color is the rectangle?", "gray", ("gray", "rectangle")),
        ("what is the color of the shape?", "gray", ("gray", None)),
        ("is there a blue shape in the image?", "yes", ("blue", None)),
        ("is there a blue shape in the image?", "no", (None, None)),
        ("is there not a blue shape?", "yes", (None, None)),
        ("is there not a blue shape?", "no", ("blue", None)),
        ("does the image not contain a triangle?", "no", (None, "triangle")),
        ("is no triangle present?", "no", (None, "triangle")),
        ("is no triangle present?", "yes", (None, None)),
    ],
)
def test_colors_and_shapes_that_a_question_implies(question, answer, implied):
    kind = "yesno" if answer in ("yes", "no") else "color"
    assert implied_by([{"question": question, "answer": answer, "type": kind}]) == implied


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (
            [["is there a blue shape?", "yes", 0], ["what color is the shape?", "red", 0]],
            "image 0: .*blue and red",
        ),
        ([["what?", "maybe", 0]], "entry 0: answer 'maybe'"),
        ([["what?", "yes"]], "entry 0: expected"),
        ([["what shape is present?", "circle", 9]], "image 9: image '9.png' is not in"),
    ],
)
def test_faults_are_errors(raw, questions, message):
    (raw / "easy_vqa" / "data" / "train" / "questions.json").write_text(json.dumps(questions))
    with pytest.raises(DataError, match=message):
        keys(raw)


def test_another_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no easy-VQA in .*questions\.json"):
        keys(tmp_path)
