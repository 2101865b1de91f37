import json

import pytest

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.index import ShardIndex
from mmlab.data.sources.image_folder import images
from tests.tiny_builds import built
from tests.tiny_files import jpeg, png


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for name in ("cat/a.png", "cat/deep/a.JPG", "dog/b.webp", "loose.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())
    (root / "dog" / "notes.txt").write_text("no picture")
    return root


def build(tmp_path, *arguments, **options):
    index, tally = built(images(*arguments, **options), tmp_path / "out")
    records = {str(key): json.loads(index.read(i)["json"]) for i, key in enumerate(index.keys)}
    assert all("png" in index.extensions(i) for i in range(len(index)))
    return records, tally.counts()


def test_a_class_is_the_first_subfolder(folder, tmp_path):
    records, counts = build(tmp_path, folder)
    assert records == {
        "cat_a": {"id": "cat/a.png", "class": "cat"},
        "cat_deep_a": {"id": "cat/deep/a.JPG", "class": "cat"},
        "dog_b": {"id": "dog/b.webp", "class": "dog"},
        "loose": {"id": "loose.png"},
    }
    assert counts == {"rows": 5, "samples": 4, "no image": 1, "without_class": 1, "classes": 2}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "file,label\ncat/a.png,nature \ndog/b.webp,\n"),
        ("t.tsv", "label\tfile\nnature\tcat/a.png\n\tdog/b.webp\n"),
        ("t.jsonl", '{"image": "cat/a.png", "class": "nature"}\n{"image": "dog/b.webp"}\n'),
    ],
)
def test_a_table_gives_the_classes_and_chooses_the_images(folder, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    records, counts = build(tmp_path, folder, tmp_path / name)
    assert {key: record.get("class") for key, record in records.items()} == {"cat_a": "nature", "dog_b": None}
    assert counts["samples"] == 2 and counts["without_class"] == 1 and counts["classes"] == 1


def test_numbers_stay_numbers_and_columns_can_be_named(folder, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"p": "cat/a.png", "class": "wrong", "n": 3}\n{"p": "loose.png", "n": 0}\n')
    records, _ = build(tmp_path, folder, tmp_path / "t.jsonl", image_field="p", class_field="n")
    assert {key: record["class"] for key, record in records.items()} == {"cat_a": 3, "loose": 0}


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("t.csv", "image,clas\ncat/a.png,x\n", {"class_field": "class"}, "no column 'class'.*mean 'clas'"),
        ("t.csv", "image,kind\ncat/a.png,x\n", {}, "none of the columns class, label; there are image, kind"),
        ("t.csv", "image,class\nzz.png,x\n", {}, r"line 2: image 'zz\.png' is not in"),
        ("t.csv", "image,class\n../a.png,x\n", {}, "points outside"),
        ("t.csv", "image,class\n", {}, "has no row below its header: image, class"),
        ("t.jsonl", '{"image": "cat/a.png", "class": ["x"]}', {}, r"line 1: 'class' must be a class's name or number"),
        ("t.jsonl", '{"image": 5.5, "class": "x"}', {}, "named by one path, not 5.5"),
        ("t.txt", "", {}, "not '.txt'"),
    ],
)
def test_bad_tables_are_errors(folder, tmp_path, name, text, options, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        build(tmp_path, folder, tmp_path / name, **options)
    assert not (tmp_path / "out").exists()


def test_losses_within_the_budget_are_counted(folder, tmp_path):
    (folder / "cat" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="neither JPEG, PNG, WebP, BMP, GIF nor TIFF"):
        build(tmp_path, folder)
    records, counts = build(tmp_path, folder, missing_budget=0.2)
    assert len(records) == 4 and counts["unsupported"] == 1


def test_no_folder_no_image_and_columns_without_a_table(folder, tmp_path):
    with pytest.raises(DataError, match="no folder"):
        build(tmp_path, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        build(tmp_path, tmp_path / "empty")
    with pytest.raises(ConfigError, match="give --labels"):
        build(tmp_path, folder, class_field="class")


def test_maps_have_the_paths_of_their_images(folder, tmp_path):
    maps = tmp_path / "maps"
    for name in ("cat/a.png", "cat/deep/a.png", "dog/b.png"):
        (maps / name).parent.mkdir(parents=True, exist_ok=True)
        (maps / name).write_bytes(png(3, 2))
    with pytest.raises(
        DataError, match=r"image 'loose\.png' is not in .*maps \(missing or unsupported: 1, the missing budget allows 0"
    ):
        build(tmp_path, folder, maps=maps)
    records, counts = build(tmp_path, folder, maps=maps, missing_budget=0.25)
    assert set(records) == {"cat_a", "cat_deep_a", "dog_b"} and counts["missing"] == 1
    index = ShardIndex.open(tmp_path / "out")
    assert all(index.read(i)["map.png"] == png(3, 2) for i in range(3))
    (maps / "loose.png").write_bytes(jpeg())
    _, tally = built(images(folder, maps=maps), tmp_path / "other")
    assert tally.left_out["map"] == 1 and "contents of its map are jpg; maps are PNG" in tally.examples["map"]
