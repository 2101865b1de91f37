"""The pages that `mmlab init` writes for data of one's own."""

import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmlab import cli
from mmlab.config.compose import compose
from tests.tiny_shapes import make_records, make_shapes

CAPTION = {"caption": "a red circle"}
QUESTION = {"questions": [{"question": "what color is it?", "answer": "red", "type": "color"}]}
CHAT = {"conversations": [{"from": "human", "value": "<image>\nhi?"}, {"from": "gpt", "value": "a circle"}]}
QUICK = ["trainer=cpu", "trainer.max_steps=1", "trainer.limit_val_batches=1", "data.global_batch=2", "logger=none"]
QUICK += ["data.micro_batch=2", "callbacks.picture_use.questions=2", "callbacks.samples.count=1"]


def picture(width: int = 40, height: int = 30) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def run(*argv: str) -> int:
    return cli.main([str(one) for one in argv])


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("record", "stages", "turns"),
    [
        (CAPTION, ["language", "finetune"], "caption"),
        (QUESTION, ["finetune"], "auto"),
        (CHAT, ["finetune"], "auto"),
        (CAPTION | QUESTION, ["language", "align", "finetune"], "every"),
        (CAPTION | CHAT, ["language", "align", "finetune"], "every"),
        ({"caption": "red", **QUESTION}, ["language", "align", "finetune"], "auto"),
    ],
)
def test_the_stages_follow_from_what_there_is(here, capsys, record, stages, turns):
    make_records(here / "data" / "train", [record] * 3, [picture()] * 3)
    assert run("init", "mine", "data") == 0
    said = capsys.readouterr().out
    assert [stage for stage in ("language", "align", "finetune") if f"experiment=mine/{stage}" in said] == stages
    assert sorted(path.stem for path in Path("conf/experiment/mine").iterdir()) == sorted(stages)
    cfg = compose("train", [f"experiment=mine/{stages[-1]}"])
    assert cfg.stage.prompt.turns == turns and list(cfg.data.val) == []


@pytest.mark.parametrize(("captions", "stages"), [(4, ["language", "align", "finetune"]), (3, ["finetune"])])
def test_samples_without_a_caption_do_not_stop_a_run(here, capsys, captions, stages):
    records = [CAPTION | QUESTION] * captions + [QUESTION] * (6 - captions)
    make_records(here / "data" / "train", records, [picture()] * 6)
    assert run("init", "mine", "data") == 0
    assert sorted(path.stem for path in Path("conf/experiment/mine").iterdir()) == sorted(stages)
    budgets = {stage: compose("train", [f"experiment=mine/{stage}"]).data.bad_budget for stage in stages}
    assert budgets.pop("finetune") == 0.001 and set(budgets.values()) <= {1}


def test_a_folder_may_have_any_name(here, capsys):
    folder = "my data: #1's"
    make_records(here / folder / "train", [QUESTION] * 3, [picture()] * 3)
    make_records(here / folder / "val", [QUESTION] * 3, [picture()] * 3)
    assert run("init", "mine", folder) == 0
    assert compose("train", ["experiment=mine/finetune"]).data.root == folder
    commands = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert run(*shlex.split(commands[0])[1:]) == 0 and (here / folder / "tokenizer" / "tokenizer.json").is_file()
    assert shlex.split(commands[-2])[-1] == f"data.path={folder}/val"


def test_each_page_trains_and_transformers_takes_the_result(here, capsys):
    make_shapes(here / "data", train=6, val=2)
    assert run("init", "mine", "data") == 0
    for stage in ("language", "align", "finetune"):
        assert run("train", f"experiment=mine/{stage}", *QUICK) == 0, capsys.readouterr().err
    assert {path.name for path in Path("runs").glob("*finetune*/artifacts/*")} == {"vision", "connector", "language"}
    (folder,) = Path("runs").glob("*finetune*")
    assert run("export", f"run={folder}", "to=transformers", "out=exported") == 0, capsys.readouterr().err
    assert "LlavaForConditionalGeneration" in Path("exported/config.json").read_text()


def test_sizes_follow_from_the_counts(here, capsys):
    long: dict[str, Any] = {"questions": [{"question": "why? " * 100, "answer": "because " * 50}]}
    make_records(here / "data" / "train", [long] * 5, [picture(400, 300)] * 5)
    make_records(here / "data" / "val", [long] * 2, [picture(400, 300)] * 2)
    assert run("init", "mine", "data") == 0
    cfg = compose("train", ["experiment=mine/finetune"])
    assert cfg.model.vision.image_size == 192 and cfg.data.aspect == "pad"
    assert cfg.data.max_length == 640 == cfg.model.language.architecture.max_position_embeddings
    assert cfg.trainer.max_steps == 1000 and cfg.data.val[0].path == "val"
    page = Path("conf/experiment/mine/finetune.yaml").read_text()
    assert "from 5 samples with 5 pictures (longer side 400 px)" in page and "0 captions, 5 questions" in page
    commands = [line.removeprefix("#   ") for line in page.splitlines() if line.startswith("#   ")]
    assert commands == capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert commands[-2] == "mmlab eval run=mine/finetune data.path=data/val"


def test_pages_are_not_overwritten(here, capsys):
    make_records(here / "data" / "train", [CAPTION] * 2, [picture()] * 2)
    assert run("init", "mine", "data") == 0
    page = Path("conf/experiment/mine/finetune.yaml")
    page.write_text("mine")
    assert run("init", "mine", "data") == 2 and "exists; give another name, or --overwrite" in capsys.readouterr().err
    assert page.read_text() == "mine"
    assert run("init", "mine", "data", "--overwrite") == 0 and page.read_text() != "mine"


@pytest.mark.parametrize(
    ("record", "with_picture", "says"),
    [
        (CAPTION, False, "has no pictures"),
        ({"class": "cat"}, True, "1 class"),
        ({"id": "1"}, True, "neither captions nor questions"),
    ],
)
def test_what_cannot_be_trained_is_refused(here, capsys, record, with_picture, says):
    make_records(here / "data" / "train", [record] * 2, [picture() if with_picture else None] * 2)
    assert run("init", "mine", "data") == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not Path("conf").exists()


def test_a_wrong_command_line_is_refused(here, capsys):
    assert run("init", "my/data", "data") == 2 and "cannot name a recipe" in capsys.readouterr().err
    make_records(Path("shards"), [QUESTION], [picture()])
    for name in ("llava", "shapes", "easy_vqa"):  # they would hide the pages that they refer to
        assert run("init", name, "shards") == 2 and f"{name} is the name of a page" in capsys.readouterr().err
    shutil.rmtree("shards")
    assert run("init", "mine", "nowhere") == 1 and "nowhere" in capsys.readouterr().err
    Path("data/train").mkdir(parents=True)
    Path("data/train/shard-0.tar").write_bytes(b"")
    assert run("init", "mine", "data") == 1 and "has no index" in capsys.readouterr().err
    assert run("init", "mine") == 2 and "DIR" in capsys.readouterr().err
    assert run("init", "mine", "s3://b/x") == 2 and "s3://b/x is an address, and all records" in capsys.readouterr().err
    assert run("init", "mine", "data", "--out", "s3://b/c") == 2 and "s3://b/c is an address" in capsys.readouterr().err
    assert json.dumps(sorted(path.name for path in here.iterdir())) == '["data"]'
