"""The tiny chain of runs through the command line, and swapping each part by one argument."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from mmlab import cli
from mmlab.stage.assembly import restore
from tests.tiny_commands import carry_out

# The user's own preset, which each command of a chain selects by the same word.
PRESET = """
# @package _global_
data: {global_batch: 4, micro_batch: 4}
trainer: {max_steps: 2, limit_val_batches: 0, precision: 32-true}
"""
SHORT = ("debug=short", "trainer=cpu", "logger=none")
RUNS = ("vision_tiny", "language_tiny", "align_tiny", "finetune_tiny")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A user's folder: a preset, synthetic data, a tokenizer, an image, and the chain of four runs."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "conf" / "debug").mkdir(parents=True)
    (folder / "conf" / "debug" / "short.yaml").write_text(PRESET.lstrip())
    Image.new("RGB", (90, 60), "red").save(folder / "photo.png")
    commands = [
        f"shards build shapes data/shapes/{split} --split {split} --count {count}"
        for split, count in (("train", 36), ("val", 8))
    ]
    commands += ["shards tokenizer data/shapes/train --out data/shapes/tokenizer --vocab-size 320"]
    commands += [f"train experiment=llava/{recipe} {' '.join(SHORT)}" for recipe in RUNS]
    return carry_out(folder, commands)


@pytest.fixture
def mmlab(work, monkeypatch, capsys):
    """Run a command in the user's folder; it must succeed."""
    monkeypatch.chdir(work)

    def run(*argv: str) -> str:
        code = cli.main(list(argv))
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


def card(run: str, part: str) -> dict:
    return json.loads(Path("runs", run, "artifacts", part, "card.json").read_text())


def trained_from(run: str) -> list[str]:
    """The runs in `stage.init_from`."""
    return yaml.safe_load(Path("runs", run, "config.yaml").read_text())["stage"]["init_from"]


def ask(mmlab, run: str) -> None:
    """Score the run on synthetic questions and ask it one."""
    out = mmlab(
        "eval", f"run={run}", "data.path=data/shapes/val", "limit=8", "max_new_tokens=4", "trainer.accelerator=cpu"
    )
    assert out.startswith(f"{'':<14}{'questions':>10}")
    folder = Path("runs", run.replace("/", "-"), "eval", "val")
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["questions"] == 8 and 0 <= scores["accuracy"] <= 1
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and sum(row["right"] for row in rows) == scores["accuracy"] * 8
    assert scores["blind"]["questions"] == 8 and "gain" in out.splitlines()[0]
    assert sum(row["blind"] == row["prediction"] for row in rows) == scores["blind"]["unchanged"] * 8
    assert Image.open(folder / "grid.png").width > 500
    answer = mmlab("chat", f"run={run}", "image=photo.png", "question=what is it?", "max_new_tokens=4")
    assert answer.endswith("\n") and len(answer.splitlines()) <= 5


def test_the_chain(mmlab):
    for recipe in RUNS:
        assert json.loads(Path(f"runs/llava-{recipe}-short/done.json").read_text())["steps"] == 2
    assert trained_from("llava-align_tiny-short") == ["llava-vision_tiny-short", "llava-language_tiny-short"]
    assert trained_from("llava-finetune_tiny-short")[-1] == "llava-align_tiny-short"
    aligned, tuned = (card(f"llava-{name}_tiny-short", "connector") for name in ("align", "finetune"))
    assert aligned["against"]["vision"] == tuned["against"]["vision"]
    assert aligned["content_hash"] != tuned["content_hash"]
    ask(mmlab, "llava/finetune_tiny-short")


def test_a_run_is_assembled_from_earlier_runs(work, monkeypatch):
    monkeypatch.chdir(work)
    model, _ = restore(Path("runs/llava-align_tiny-short"))
    vision = AutoModel.from_pretrained("runs/llava-vision_tiny-short/artifacts/vision").state_dict()
    language = AutoModelForCausalLM.from_pretrained("runs/llava-language_tiny-short/artifacts/language").state_dict()
    with model.vision.whole_tower():
        ours = model.vision.tower.state_dict()
    assert ours.keys() == vision.keys() and all(torch.equal(ours[k], vision[k]) for k in vision)
    assert all(torch.equal(v, language[k]) for k, v in model.language.causal.state_dict().items())
    tuned, _ = restore(Path("runs/llava-finetune_tiny-short"))
    assert not all(torch.equal(v, language[k]) for k, v in tuned.language.causal.state_dict().items())


def test_a_repeated_command_is_the_same_run(mmlab):
    before = Path("runs/llava-align_tiny-short/done.json").stat().st_mtime_ns
    out = mmlab("train", "experiment=llava/align_tiny", *SHORT)
    assert out.startswith("llava-align_tiny-short is complete")
    assert Path("runs/llava-align_tiny-short/done.json").stat().st_mtime_ns == before


SWAPS = {
    "model/connector=linear": ("align_tiny", "finetune_tiny"),
    "model/vision=clip_tiny": ("vision_tiny", "align_tiny", "finetune_tiny"),
    "model/language=qwen2_tiny": ("language_tiny", "align_tiny", "finetune_tiny"),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_swapping_a_part_is_one_argument(mmlab, swap):
    option = swap.partition("=")[2]
    for recipe in SWAPS[swap]:
        mmlab("train", f"experiment=llava/{recipe}", swap, *SHORT)
    run = f"llava-finetune_tiny-short-{option}"
    swapped = {f"llava-{recipe}-short-{option}" for recipe in SWAPS[swap]} - {run}
    plain = {f"llava-{recipe}-short" for recipe in set(RUNS) - set(SWAPS[swap])}
    assert set(trained_from(run)) == swapped | plain
    config = json.loads(Path("runs", run, "artifacts", "language", "config.json").read_text())
    assert config["model_type"] == ("qwen2" if option == "qwen2_tiny" else "llama")
    connector = card(run, "connector")
    assert connector["class"] == ("LinearConnector" if option == "linear" else "MLPConnector")
    aligned = card(f"llava-align_tiny-short-{option}", "connector")
    assert aligned["against"]["vision"] == connector["against"]["vision"]
    same = connector["against"]["vision"] == card("llava-finetune_tiny-short", "connector")["against"]["vision"]
    assert same == (option != "clip_tiny")
    ask(mmlab, run)


def test_gradient_checkpointing_trains_the_same_weights(mmlab):
    mmlab("train", "experiment=llava/finetune_tiny", *SHORT, "trainer.gradient_checkpointing=true", "run.name=again")
    weights = [
        load_file(f"runs/{run}/artifacts/language/model.safetensors") for run in ("llava-finetune_tiny-short", "again")
    ]
    for name, plain in weights[0].items():
        torch.testing.assert_close(weights[1][name], plain, rtol=1e-5, atol=1e-7)


def test_a_sharded_run_leaves_the_same_artifacts(mmlab, work):
    options = ["trainer.strategy=fsdp", "trainer.fsdp.whole_below=0", "trainer.devices=2", "data.micro_batch=2"]
    command = ["train", "experiment=llava/finetune_tiny", *SHORT, *options, "run.name=sharded"]
    done = subprocess.run([sys.executable, "-m", "mmlab", *command], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "terminate" not in done.stderr, done.stderr
    for part in ("connector", "language"):
        whole, sharded = (Path("runs", run, "artifacts", part) for run in ("llava-finetune_tiny-short", "sharded"))
        assert {path.name for path in whole.iterdir()} == {path.name for path in sharded.iterdir()}
        ours, theirs = load_file(sharded / "model.safetensors"), load_file(whole / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5) for name in ours)
        assert card("sharded", part)["against"] == card("llava-finetune_tiny-short", part)["against"]
    ask(mmlab, "sharded")


def test_single_layers_can_be_trained_and_reused_by_the_next_run(mmlab):
    layers = ("causal.model.layers.1.", "causal.model.norm.")
    learns = "stage.trainable=[connector,language.causal.model.layers.1,language.causal.model.norm]"
    out = mmlab("train", "experiment=llava/finetune_tiny", *SHORT, learns, "run.name=partly")
    assert "trained parts: runs/partly/artifacts/connector, runs/partly/artifacts/language" in out
    before, after = (restore(Path("runs", run))[0] for run in ("llava-align_tiny-short", "partly"))
    old, new = before.language.state_dict(), after.language.state_dict()
    moved = {name for name in new if not torch.equal(old[name], new[name])}
    assert moved == {name for name in new if name.startswith(layers)}
    ask(mmlab, "partly")
    runs = "stage.init_from=[llava-vision_tiny-short,partly]"
    mmlab("train", "experiment=llava/align_tiny", *SHORT, runs, "run.name=next")
    assert (
        card("next", "connector")["against"]["language"]["content_hash"] == card("partly", "language")["content_hash"]
    )


def test_a_part_of_another_chain_is_refused(work, monkeypatch, capsys):
    """A connector that was trained with one encoder is not silently combined with another."""
    monkeypatch.chdir(work)
    assert cli.main(["train", "experiment=llava/vision_tiny", "model/vision=clip_tiny", *SHORT]) == 0
    runs = "[llava-vision_tiny-short-clip_tiny,llava-language_tiny-short,llava-align_tiny-short]"
    argv = ["train", "experiment=llava/finetune_tiny", "model/vision=clip_tiny", *SHORT, "run.name=mixed"]
    assert cli.main([*argv, f"stage.init_from={runs}"]) == 2
    assert "was trained with another vision" in capsys.readouterr().err
