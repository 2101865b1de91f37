import json

import pytest

from mmlab.config.errors import DataError
from mmlab.data.sources.captions import captions
from tests.tiny_builds import built
from tests.tiny_files import png


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.JPG", "sub/a.png"):
        (folder / name).write_bytes(png())
    return folder


def build(tmp_path, *arguments, **options):
    index, tally = built(captions(*arguments, **options), tmp_path / "out")
    return {str(key): json.loads(index.read(i)["json"])["caption"] for i, key in enumerate(index.keys)}, tally.counts()


def test_side_files(images, tmp_path):
    (images / "a.txt").write_text("one\n")
    (images / "sub" / "a.txt").write_text("zwölf", "utf-8")
    texts, counts = build(tmp_path, images)
    assert texts == {"a": "one", "sub_a": "zwölf"}
    assert counts == {"rows": 3, "samples": 2, "no-caption": 1}


def test_encodings_and_names_of_side_files(images, tmp_path):
    (images / "a.txt").write_text("größe", "utf-8-sig")
    (images / "b.TXT").write_text("größe", "utf-16")
    texts, counts = build(tmp_path, images)
    assert texts == {"a": "größe", "b": "größe"} and counts["no-caption"] == 1
    (images / "sub" / "a.txt").write_text("one\ngröße", "latin-1")
    with pytest.raises(DataError, match=r"sub/a\.txt, line 2, is not UTF-8: byte 0xF6\. If it is Latin-1"):
        build(tmp_path, images)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", '\ufefffilename,caption\na.png,"one, two"\na.png,other\nb.JPG,\n'),
        ("t.tsv", "filename\tcaption\na.png\tone, two\na.png\tother\nb.JPG\t\n"),
        (
            "t.jsonl",
            '{"file": "a.png", "text": "one, two"}\n\n{"file": "a.png", "text": "other"}\n'
            '{"file": "b.JPG", "text": null}',
        ),
    ],
)
def test_tables(images, tmp_path, name, text):
    (tmp_path / name).write_text(text, "utf-8")
    texts, counts = build(tmp_path, images, tmp_path / name)
    assert texts == {"a": "one, two", "a-1": "other"}
    assert counts == {"rows": 3, "samples": 2, "no-caption": 1, "renamed": 1}


@pytest.mark.parametrize(
    ("text", "options", "classes"),
    [
        ('{"image": "a.png", "caption": "x", "class": "red"}\n{"image": "b.JPG", "caption": "y"}', {}, ["red", None]),
        ('{"image": "a.png", "caption": "x", "label": 0}\n', {}, [0]),
        ('{"image": "a.png", "caption": "x", "kind": "k", "class": "c"}\n', {"class_field": "kind"}, ["k"]),
        ('{"image": "a.png", "caption": "x"}\n', {}, [None]),
    ],
)
def test_a_class_column_is_passed_on(images, tmp_path, text, options, classes):
    (tmp_path / "t.jsonl").write_text(text)
    index, _ = built(captions(images, tmp_path / "t.jsonl", **options), tmp_path / "out")
    assert [json.loads(index.read(i)["json"]).get("class") for i in range(len(index))] == classes


def test_a_missing_class_column_is_an_error(images, tmp_path):
    (tmp_path / "t.csv").write_text("image,caption,knid\na.png,x,y\n")
    with pytest.raises(DataError, match=r"no column 'kind'.*mean 'knid'"):
        build(tmp_path, images, tmp_path / "t.csv", class_field="kind")


def test_columns_can_be_named(images, tmp_path):
    (tmp_path / "t.csv").write_text("p,q,caption\na.png,mine,other\n")
    texts, _ = build(tmp_path, images, tmp_path / "t.csv", image_field="p", caption_field="q")
    assert texts == {"a": "mine"}


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        (
            "t.csv",
            "pictur,caption\na.png,x\n",
            {"image_field": "picture"},
            "no column 'picture'.*mean 'pictur'",
        ),
        ("t.csv", "image,words\na.png,x\n", {}, "none of the columns caption"),
        ("t.csv", "image,caption\nzz.png,x\n", {}, r"line 2: image 'zz\.png' is not in"),
        ("t.csv", "image,caption\n../a.png,x\n", {}, "points outside"),
        ("t.jsonl", '{"image": "a.png", "caption": ""}\n[1]\n', {}, "line 2: not a JSON object"),
        ("t.jsonl", '{"image": "a.png", "caption": 5}', {}, "no-caption 1, such as .*line 1: It has no caption"),
        ("t.parquet", "", {}, "not '.parquet'"),
    ],
)
def test_bad_tables_are_errors(images, tmp_path, name, text, options, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        build(tmp_path, images, tmp_path / name, **options)
    assert not (tmp_path / "out").exists()


def test_missing_images_within_the_budget(images, tmp_path):
    (tmp_path / "t.csv").write_text("image,caption\nzz.png,x\na.png,y\n")
    texts, counts = build(tmp_path, images, tmp_path / "t.csv", missing_budget=0.5)
    assert texts == {"a": "y"} and counts["missing"] == 1
