"""The tiny chain of MiniGPT-4 through the command line, and scores of its descriptions."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmlab import cli
from mmlab.stage.assembly import restore
from tests.tiny_commands import carry_out

RECIPES = (
    "llava/vision_tiny",
    "minigpt4/qformer_tiny",
    "minigpt4/captions_tiny",
    "minigpt4/language_tiny",
    "minigpt4/stage1_tiny",
    "minigpt4/stage2_tiny",
)
SHORT = "data.global_batch=4 data.micro_batch=4 trainer=cpu trainer.max_steps=2 trainer.limit_val_batches=0 logger=none"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    commands = [f"shards build shapes data/shapes/{split} --split {split} --count 12" for split in ("train", "val")]
    commands += ["shards tokenizer data/shapes/train --out data/shapes/tokenizer --vocab-size 320"]
    done: list[str] = []
    for recipe in RECIPES:
        name = recipe.partition("/")[2]
        before = [run for run in done if run.startswith(("vision", "qformer", "language", "stage1"))]
        of = {"qformer_tiny": "[vision_tiny]", "language_tiny": "[captions_tiny]"}
        starts = of.get(name, f"[{','.join(before)}]" if "stage" in name else "[]")
        commands.append(f"train experiment={recipe} {SHORT} run.name={name} stage.init_from={starts}")
        done.append(name)
    return carry_out(folder, commands)


@pytest.fixture
def mmlab(work, monkeypatch, capsys):
    """Run a command in the user's folder; it must succeed."""
    monkeypatch.chdir(work)

    def run(command: str) -> str:
        code = cli.main(command.split())
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


def card(run: str, part: str) -> dict:
    return json.loads(Path("runs", run, "artifacts", part, "card.json").read_text())


def test_the_chain_saves_only_the_linear_layer(work, monkeypatch):
    monkeypatch.chdir(work)
    for stage in ("stage1_tiny", "stage2_tiny"):
        assert [path.name for path in Path("runs", stage, "artifacts").iterdir()] == ["connector"]
    first, second = (card(f"stage{n}_tiny", "connector") for n in (1, 2))
    assert first["against"] == second["against"] and set(first["against"]) == {"vision", "qformer", "language"}
    assert first["content_hash"] != second["content_hash"]
    model, _ = restore(Path("runs/stage2_tiny"))
    pretrained, _ = restore(Path("runs/qformer_tiny"))
    names = model.qformer.state_dict()
    assert len(names) < len(pretrained.qformer.state_dict())
    assert all(torch.equal(value, pretrained.qformer.state_dict()[name]) for name, value in names.items())


@pytest.mark.parametrize("ask", ["run=stage1_tiny", "run=stage1_tiny template=minigpt4", "run=stage2_tiny"])
def test_descriptions_are_scored(mmlab, ask, tmp_path):
    out = mmlab(f"eval {ask} data.path=data/shapes/val limit=6 max_new_tokens=3 out={tmp_path} trainer.accelerator=cpu")
    assert "incoherent" in out and "no end" in out and str(tmp_path / "grid.png") in out
    scores = json.loads((tmp_path / "scores.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "descriptions.jsonl").read_text().splitlines()]
    assert scores["descriptions"] == len(rows) == 6
    assert scores["template"] == ("plain" if ask == "run=stage1_tiny" else "minigpt4")
    assert all((row["question"] == "") == (scores["template"] == "plain") for row in rows)
    for fault in ("repeated", "fragment", "no_end"):
        assert scores[fault] == pytest.approx(sum(fault in row["faults"] for row in rows) / 6)
    assert scores["incoherent"] == sum(bool(row["faults"]) for row in rows) / 6 > 0
    assert Image.open(tmp_path / "grid.png").width > 500


def test_a_describing_model_can_answer_questions(mmlab, tmp_path):
    ask = "eval run=stage2_tiny describe=false data.path=data/shapes/val limit=4 max_new_tokens=2"
    assert mmlab(f"{ask} out={tmp_path} trainer.accelerator=cpu").startswith(f"{'':<14}{'questions':>10}")


def test_a_missing_path_is_named(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    assert cli.main(["eval", "run=stage2_tiny", "data.path=data/shapes/vall"]) != 0
    assert "data/shapes/vall" in capsys.readouterr().err
