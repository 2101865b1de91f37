"""`mmlab eval` of a run that compares images and texts, as a user types it."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mmlab import cli
from mmlab.data.shard_files import ShardWriter
from tests.evaluate.test_retrieval import picture
from tests.evaluate.tiny_scores import contrastive_run, make_noise, make_run


@pytest.fixture(scope="module")
def work(tmp_path_factory, tokenizer_folder) -> Path:
    """A folder with an eye, images with classes and captions, and images with numbers of classes alone."""
    root = tmp_path_factory.mktemp("work")
    contrastive_run(root / "runs", tokenizer_folder)
    make_noise(root / "val", 12, 1)
    with ShardWriter(root / "numbered", 4, quiet=True) as writer:
        for n in range(6):
            writer.write(f"n{n}", {"png": picture(n), "cls": str(n % 2).encode()})
    with ShardWriter(root / "bare", 4, quiet=True) as writer:
        writer.write("one", {"png": picture(0), "json": {}})
    return root


@pytest.fixture
def evaluate(work, monkeypatch, capsys):
    monkeypatch.chdir(work)

    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(["eval", "run=eye", *argv, "trainer.accelerator=cpu"])
        return code, *capsys.readouterr()

    return run


def test_captions_and_classes(work, evaluate):
    code, out, err = evaluate("data.path=val", "batch_size=5")
    assert code == 0, err
    folder = work / "runs" / "eye" / "eval" / "val"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["run"] == "eye" and scores["samples"] == 12
    retrieval, classes = scores["retrieval"], scores["zero_shot"]
    assert retrieval["image_to_text"]["chance"]["r@1"] == pytest.approx(1 / 12) and retrieval["captions"] == 12
    assert classes["prompts"] == ["a photo of a {}."] and list(classes["per_class"]) == ["circle", "square", "star"]
    assert classes["majority"]["top1"] == pytest.approx(1 / 3) and classes["top5"] is None
    assert "image to text" in out and "majority" in out
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    right = sum(line["class"] == line["predicted"] for line in lines) / 12
    assert classes["top1"] == pytest.approx(right) and lines[3]["key"] == "val003" and lines[0]["texts"][0]
    assert retrieval["image_to_text"]["r@1"] == pytest.approx(sum(line["rank"] == 1 for line in lines) / 12)
    sheets = {path.name: Image.open(path).width for path in folder.glob("*.png")}
    assert set(sheets) == {"retrieved_texts.png", "retrieved_images.png", "confusion.png"}
    # Another number of images at a time changes nothing.
    assert evaluate("data.path=val", "batch_size=12", "out=again")[0] == 0
    again = json.loads((work / "again" / "scores.json").read_text())
    assert again == scores


def test_classes_that_are_numbers_need_names(work, evaluate):
    code, _, err = evaluate("data.path=numbered")
    assert code == 1 and "0 is a number; name them in order, classes=[cat,dog]" in err
    assert "(or classes=[0,1] if these are the names)" in err
    prompts = "class_prompts=['a drawing of a {}.','a {}']"
    code, out, err = evaluate("data.path=numbered", "classes=[red_cat,dog,cow]", prompts, "limit=4")
    assert code == 0, err
    scores = json.loads((work / "runs" / "eye" / "eval" / "numbered" / "scores.json").read_text())
    assert "retrieval" not in scores and "no retrieval, which needs two of each" in out
    assert scores["zero_shot"]["prompts"] == ["a drawing of a {}.", "a {}"]
    assert {name: row["images"] for name, row in scores["zero_shot"]["per_class"].items()} == {
        "red_cat": 2,
        "dog": 2,
        "cow": 0,
    }


def test_classes_can_be_digits(work, evaluate):
    code, _, err = evaluate("data.path=numbered", "classes=[1,0]", "out=digits")
    assert code == 0, err
    scores = json.loads((work / "digits" / "scores.json").read_text())
    assert {name: row["images"] for name, row in scores["zero_shot"]["per_class"].items()} == {"1": 3, "0": 3}
    lines = [json.loads(line) for line in (work / "digits" / "predictions.jsonl").read_text().splitlines()]
    right = sum(line["class"] == line["predicted"] for line in lines) / 6
    assert scores["zero_shot"]["top1"] == pytest.approx(right)


def test_the_prompt_is_the_one_of_the_training(work, evaluate, tokenizer_folder):
    tiny = "{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2, image_size: 16}"
    overrides = ["experiment=llava/vision_tiny", "model/vision=siglip_tiny", f"model.vision.architecture={tiny}"]
    overrides += ["stage.class_prompt='one {}'"]
    learns = ["vision", "text", "vision_head", "text_head", "similarity"]
    make_run(work / "runs", "prompted", [*overrides, f"model.text.tokenizer={tokenizer_folder}"], learns)
    assert evaluate("run=prompted", "data.path=val")[0] == 0
    scores = json.loads((work / "runs" / "prompted" / "eval" / "val" / "scores.json").read_text())
    assert scores["zero_shot"]["prompts"] == ["one {}"]


def test_a_users_model_of_no_kind_is_refused(work, evaluate, monkeypatch):
    (work / "ownlab.py").write_text("from torch import nn\nclass Other(nn.Module): pass\n")
    monkeypatch.syspath_prepend(work)
    monkeypatch.setenv("MMLAB_ALLOW_TARGETS", "ownlab")
    config = yaml.safe_load((work / "runs" / "eye" / "config.yaml").read_text())
    (work / "runs" / "own").mkdir()
    (work / "runs" / "own" / "config.yaml").write_text(
        yaml.safe_dump({**config, "model": {"_target_": "ownlab.Other"}})
    )
    code, _, err = evaluate("run=own", "data.path=val")
    assert code == 2 and "own is derived from none of mmlab's models" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (
            ["data.path=bare"],
            1,
            "bare has nothing to score: no retrieval, which needs two of each: there are 1",
        ),
        (["data.path=val", "class_prompts=[a photo]"], 2, "class_prompts='a photo' has no {} where the class belongs"),
        (["data.path=val", "classes=[circle,square,stars]"], 2, "There is no class 'star'"),
        (
            ["data.path=val", "metric=exact"],
            2,
            "eye compares images and texts, and is scored by what it finds; leave",
        ),
        (["data.path=val", "types=[color]"], 2, "types applies to questions, and eye is asked none here; leave it out"),
        (["data.path=val", "history=own"], 2, "history=own applies to questions, and eye is asked none here"),
    ],
)
def test_mistakes_are_one_sentence(evaluate, argv, code, message):
    got, _, err = evaluate(*argv)
    assert got == code and message in err and err.count("\n") == 1
