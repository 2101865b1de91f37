import json

import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.config import Prompt
from mmlab.data.dialogues import conversations_of
from mmlab.data.sources.parquet import parquet
from tests.tiny_builds import built
from tests.tiny_files import jpeg, png

STRING = Value("string")
TEXT = {"user": STRING, "assistant": STRING, "source": STRING}
PART = {"type": STRING, "text": STRING}


def write(path, features: dict, *rows: tuple) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[i] for row in rows] for i, name in enumerate(features)}
    Dataset.from_dict(columns, features=Features(features)).to_parquet(path)


def records(index) -> list[dict]:
    return [json.loads(index.read(i)["json"]) for i in range(len(index))]


def bytes_of(data: bytes) -> dict:
    return {"bytes": data, "path": "a.png"}


def test_images_with_classes_and_captions(tmp_path):
    features = {"image": Image(), "label": ClassLabel(names=["cat", "dog"]), "caption": STRING, "id": Value("int64")}
    rows = [(bytes_of(png()), 1, "one ", 7), (bytes_of(jpeg()), 0, None, 8), (bytes_of(png()), -1, "", 9)]
    write(tmp_path / "train.parquet", features, *rows)
    index, tally = built(parquet(tmp_path / "train.parquet"), tmp_path / "out")
    assert records(index) == [{"id": "7", "caption": "one", "class": "dog"}, {"id": "8", "class": "cat"}, {"id": "9"}]
    assert list(index.keys) == ["7", "8", "9"] and index.read(0)["png"] == png() and index.read(1)["jpg"] == jpeg()
    assert tally.counts() == {"rows": 3, "samples": 3, "classes": 2, "without_text": 1}


CHATS = {
    "texts": (List(TEXT), [{"user": "What?", "assistant": "A cat.", "source": "vqa"}]),
    "conversations": (
        List({"from": STRING, "value": STRING}),
        [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    ),
    "messages": (
        List({"role": STRING, "content": List(PART)}),
        [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ],
    ),
}


@pytest.mark.parametrize("column", CHATS)
def test_chats_in_their_usual_columns(tmp_path, column):
    feature, chat = CHATS[column]
    write(tmp_path / "a.parquet", {"images": List(Image()), column: feature}, ([bytes_of(png())], chat), ([], chat))
    index, tally = built(parquet(tmp_path / "a.parquet", kind=None if column == "texts" else "vqa"), tmp_path / "out")
    record = records(index)[0]
    (dialogue,) = conversations_of(record, Prompt(), 0)
    assert [turn.text for turn in dialogue] == ["<image>\nWhat?", "A cat."] and index.type_of(0) == "vqa"
    assert index.read(0)["png"] == png()
    lost = {} if column == "texts" else {"no-picture": 1}  # a chat whose marker has no image
    assert tally.left_out == lost and index.keys[0] == "a-0000000"


def test_questions_several_images_and_broken_rows(tmp_path):
    features = {"image": List(Image()), "question": STRING, "answer": STRING}
    both = [bytes_of(png()), bytes_of(png())]
    rows = [
        *(([bytes_of(png())], "q", "a"), (both, "q", "a"), ([bytes_of(png()[:50])], "q", "a")),
        ([], None, None),
    ]
    write(tmp_path / "a.parquet", features, *rows)
    index, tally = built(parquet(tmp_path / "a.parquet"), tmp_path / "out")
    assert records(index) == [{"id": f"a-000000{n}", "questions": [{"question": "q", "answer": "a"}]} for n in range(2)]
    assert [index.extensions(i) for i in range(2)] == [["json", "png"], ["0.png", "json", "png"]]
    assert tally.left_out == {"decode": 1, "no-image": 1}
    assert tally.details == {"without_text": 0, "several_images": 1}
    write(tmp_path / "a.parquet", {**features, "answer": List(STRING)}, ([bytes_of(png())], "q", ["a", "b"]))
    _, tally = built(parquet(tmp_path / "a.parquet"), tmp_path / "out")
    assert tally.details == {"without_text": 1}


def test_images_that_are_only_named(tmp_path):
    write(tmp_path / "a.parquet", {"image": STRING, "caption": STRING}, ("b.png", "x"), ("c.png", "y"))
    with pytest.raises(DataError, match=r"row 0: image 'b\.png' is not among the data"):
        built(parquet(tmp_path / "a.parquet"), tmp_path / "out")
    (tmp_path / "b.png").write_bytes(png())
    index, tally = built(parquet(tmp_path / "a.parquet", images=tmp_path, missing_budget=0.5), tmp_path / "out")
    assert index.read(0)["png"] == png() and tally.left_out == {"missing": 1}


def test_files_of_one_split(tmp_path):
    for split, captions in {"train": "ab", "test": "c"}.items():
        for n, caption in enumerate(captions):
            name = f"data/{split}-{n:05d}-of-{len(captions):05d}.parquet"
            write(tmp_path / name, {"image": Image(), "caption": STRING}, (bytes_of(png()), caption))
    with pytest.raises(DataError, match=r"holds test and train.*--files 'train-\*'"):
        parquet(tmp_path)
    index, _ = built(parquet(tmp_path, "train-*", caption_field="caption"), tmp_path / "out")
    assert [record["caption"] for record in records(index)] == ["a", "b"]
    for workers in (1, 3):
        built(parquet(tmp_path, "train-*"), tmp_path / str(workers), workers=workers)
    assert (tmp_path / "1/shard-000000.tar").read_bytes() == (tmp_path / "3/shard-000000.tar").read_bytes()


def test_a_damaged_file_is_an_error(tmp_path):
    write(tmp_path / "a.parquet", {"image": Image(), "caption": STRING}, *[(bytes_of(png()), "text" * 99)] * 9)
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:8] + b"\xff" * 100 + data[108:])
    with pytest.raises(DataError, match=r"a\.parquet is damaged after row 0: "):
        built(parquet(tmp_path / "a.parquet"), tmp_path / "out")


def test_other_files_are_errors(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_text("text")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "y.parquet", {"pixels": STRING}, ("x",))
    write(tmp_path / "z" / "1.parquet", {"image": Image(), "caption": STRING}, (bytes_of(png()), "x"))
    write(tmp_path / "z" / "2.parquet", {"image": Image()}, (bytes_of(png()),))
    for path, options, message in [
        ("x.parquet", {}, "x.parquet is not a parquet file"),
        ("empty", {}, r"empty has no file '\*.parquet'"),
        ("nowhere", {}, "there is no .*nowhere"),
        ("y.parquet", {}, "none of the columns image, images, .*; there are pixels"),
        ("y.parquet", {"image_field": "pixel"}, "no column 'pixel'; there are pixels. Did you mean 'pixels'?"),
        ("z", {}, "2.parquet has no column 'caption', which .*1.parquet has"),
    ]:
        with pytest.raises(DataError, match=message):
            parquet(tmp_path / path, **options)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'mmlab\[parquet\]'"):
        parquet(tmp_path / "y.parquet")
