"""`mmlab score fid`: folders of images and shards, of classes alone, with a network trained on the classes."""

import json

import pytest
from PIL import Image

from mmlab import cli
from tests.evaluate.test_retrieval import picture

TINY = [
    *("experiment=classes/features", "data.root=data/classes", "trainer=cpu", "logger=none", "run.name=eye"),
    *("trainer.max_steps=2", "trainer.val_every=2", "data.global_batch=4", "data.micro_batch=4", "data.workers=0"),
    "model.vision.architecture={hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "image_size: 16, patch_size: 8}",
    "model.text.architecture={hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two folders of classes, as images and as shards with a tokenizer, and a network that was trained on them."""
    root = tmp_path_factory.mktemp("work")
    for n in range(16):
        file = root / "photos" / ("red_apple" if n % 2 else "pear") / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(n))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert cli.main(["shards", "build", "images", "photos", "data/classes", "--split", "val=0.25"]) == 0
        assert cli.main(["shards", "tokenizer", "data/classes/train", "--out", "data/classes/tokenizer"]) == 0
        assert cli.main(["train", *TINY]) == 0
    return root


@pytest.fixture
def mmlab(work, monkeypatch, capsys):
    monkeypatch.chdir(work)

    def run(command: str, code: int = 0) -> str:
        assert cli.main(command.split()) == code
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.err

    return run


def test_from_a_folder_of_classes_to_distances(work, mmlab):
    out = mmlab("score fid pictures=photos references=data/classes/train features=eye out=scores batch_size=5")
    scores = json.loads((work / "scores" / "scores.json").read_text())
    assert scores["pictures"]["pictures"] == 16 and scores["references"]["pictures"] == 11
    assert scores["pictures"]["form"].startswith("16 px") and scores["features"]["width"] == 16
    assert scores["fid"] > 0 and scores["halves_fid"] > 0 and "biased" in out and "vision encoder of the run eye" in out
    assert Image.open(work / "scores" / "pictures.png").width > 500
    # The same images as files and as shards have a distance of 0.
    mmlab("shards build images photos all")
    mmlab("score fid pictures=photos references=all features=eye out=same")
    assert json.loads((work / "same" / "scores.json").read_text())["fid"] == pytest.approx(0, abs=1e-5)
    out = mmlab("eval run=eye data.path=data/classes/val trainer.accelerator=cpu")
    assert "mean per class" in out and "no retrieval" in out
    zero_shot = json.loads((work / "runs" / "eye" / "eval" / "val" / "scores.json").read_text())["zero_shot"]
    assert zero_shot["prompts"] == ["a photo of a {}."] and set(zero_shot["per_class"]) == {"pear", "red_apple"}


def test_files_that_are_no_images_are_named(work, mmlab):
    folder = work / "drawn"
    folder.mkdir()
    for name in ("0001.png", "0002.png", "grid.png"):
        (folder / name).write_bytes(picture(len(name)) if name == "grid.png" else picture(int(name[:4])))
    (folder / "notes.txt").write_text("x")
    (folder / "0003.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    out = mmlab("score fid pictures=drawn references=photos features=eye size=8")
    assert "drawn: not read: sheets 1, no image 1" in out and "1 sample cannot be used" in out
    assert "pictures                               2" in out and "at 8 px" in out


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("score fid references=photos features=eye", 2, "'pictures' has no value"),
        ("score fid pictures=photo references=photos features=eye", 1, "Did you mean 'photos'?"),
        ("score fid pictures=photos references=photos features=eyes", 2, "Did you mean 'eye'?"),
        (
            "score fid pictures=data/classes/tokenizer references=photos features=eye",
            1,
            "has neither shards nor images",
        ),
        ("score fid pictures=photos references=photos features=eye aspect=padd", 2, "Did you mean 'pad'?"),
    ],
)
def test_mistakes_are_one_sentence(mmlab, command, code, message):
    err = mmlab(command, code)
    assert message in err and err.count("\n") == 1 and "Traceback" not in err
