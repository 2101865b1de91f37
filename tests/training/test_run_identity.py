"""A run resumes only from its own checkpoints, beside the frozen parts that it learned with, and says what changed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from mmlab import cli
from mmlab.config.errors import RunError
from mmlab.stage.assembly import restore
from mmlab.training.run_identity import keep_tokenizers, tokenizers_of
from tests.tiny_commands import carry_out

SHORT = (
    "experiment=llava/align_tiny data.global_batch=4 data.micro_batch=4 trainer=cpu trainer.precision=32-true "
    "trainer.limit_val_batches=1 callbacks.samples=null callbacks.checkpoint.every_n_steps=1"
)
FIRST: str = f"train {SHORT} run.name=first stage.init_from=[] trainer.max_steps=1"
SECOND: str = f"train {SHORT} run.name=second stage.init_from=[first]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Synthetic data, a run with random frozen parts, and one that starts from it."""
    commands = [
        f"shards build shapes data/shapes/{split} --split {split} --count {count}"
        for split, count in (("train", 16), ("val", 8))
    ]
    commands += ["shards tokenizer data/shapes/train --out data/shapes/tokenizer --vocab-size 300"]
    return carry_out(tmp_path_factory.mktemp("work"), [*commands, FIRST, f"{SECOND} trainer.max_steps=2"])


@pytest.fixture
def work(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the working folder."""
    folder = shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


def resume(capsys, steps: int = 3) -> tuple[int, str]:
    """Extend the second run; returns the exit code and what was printed."""
    code = cli.main([*SECOND.split(), f"trainer.max_steps={steps}"])
    out, err = capsys.readouterr()
    return code, out + err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_random_frozen_parts_are_said_and_saved(work, capsys):
    shutil.rmtree("runs")
    assert cli.main(FIRST.split()) == 0
    err = capsys.readouterr().err
    for name in ("vision", "language"):
        assert f"'{name}' is frozen with the random weights that it was built with" in err
    artifacts = {path.name for path in Path("runs/first/artifacts").iterdir()}
    assert artifacts == {"vision", "language", "connector"}
    model, _ = restore(Path("runs/first"))
    checkpoint = torch.load("runs/first/checkpoints/step-1/state.pt", weights_only=True)["state_dict"]
    assert {f"model.{name}" for name, _ in model.named_parameters()} <= checkpoint.keys()
    for name, value in model.vision.named_parameters():
        assert torch.equal(value, checkpoint[f"model.vision.{name}"])


def test_parts_with_a_source_are_not_saved_again(work):
    assert [path.name for path in Path("runs/second/artifacts").iterdir()] == ["connector"]
    state = torch.load("runs/second/checkpoints/step-2/state.pt", weights_only=True)
    assert all(name.startswith("model.connector.") for name in state["state_dict"])
    identity = json.loads(Path("runs/second/identity.json").read_text())
    assert state["identity"]["frozen"].keys() == {"vision", "language"}
    settings = {name: state["identity"].pop(name) for name in ("settings", "training")}
    assert settings["settings"]["optim.lr"] == 3e-3 and settings["training"]["trainer.precision"] == "32-true"
    assert settings["training"]["trainer.products"] in ("onednn", "torch")  # not auto, which depends on the machine
    assert state["identity"] == {name: identity[name] for name in state["identity"]}


def test_other_frozen_weights_are_refused_and_nothing_is_written(work, capsys):
    assert cli.main([*FIRST.split(), "run.fresh=true", "seed=1"]) == 0
    before = contents(Path("runs/second"))
    code, text = resume(capsys)
    assert code == 1
    assert "step-2 was saved with another frozen part 'vision' than runs/first/artifacts/vision has now" in text
    assert contents(Path("runs/second")) == before


def test_a_checkpoint_of_another_run_is_refused(work, capsys):
    shutil.rmtree("runs/second/checkpoints")
    shutil.copytree("runs/first/checkpoints", "runs/second/checkpoints")
    code, text = resume(capsys)
    assert code == 1 and "step-1 was saved by another run, first (" in text


def test_other_tokens_are_refused(work, capsys):
    tokenizer = Path("data/shapes/tokenizer/tokenizer.json")
    fields = json.loads(tokenizer.read_text())
    merges = fields["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    vocabulary = fields["model"]["vocab"]
    one, two = ("".join(merge) for merge in merges[:2])
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    tokenizer.write_text(json.dumps(fields))
    code, text = resume(capsys)
    assert code == 1 and "with another tokenizer of 'language': the same text would be other tokens" in text


def test_other_validation_data_and_code_are_said(work, capsys, monkeypatch):
    carry_out(work, ["shards build shapes data/shapes/val --split val --count 4 --overwrite"])
    monkeypatch.setattr("mmlab.training.run_identity.source_hash", lambda: "other")
    code, text = resume(capsys)
    assert code == 0
    assert "with another validation source 'val': val/ metrics before and after cannot be compared." in text
    assert "with another state of the code: steps before and after it are computed by different code." in text
    (earlier,) = json.loads(Path("runs/second/identity.json").read_text())["earlier"]
    assert earlier.keys() == {"until", "val", "code", "config"} and earlier["config"] == {"trainer.max_steps": 2}


def test_settings_are_compared_with_those_of_the_checkpoint(work, capsys):
    config = Path("runs/second/config.yaml")
    config.write_text(config.read_text().replace("lr: 0.003", "lr: 0.01"))
    before = contents(Path("runs/second"))
    assert cli.main([*SECOND.split(), "trainer.max_steps=3", "optim.lr=1e-2"]) == 1
    assert "step-2 was saved with another optim.lr (0.003, now 0.01)" in capsys.readouterr().err
    assert contents(Path("runs/second")) == before
    config.write_text(config.read_text().replace("lr: 0.01", "lr: 0.003"))
    assert cli.main([*SECOND.split(), "trainer.max_steps=3", "trainer.gradient_clip_val=0.5"]) == 0
    assert "with another trainer.gradient_clip_val (1.0, now 0.5): steps before" in capsys.readouterr().err


def test_a_stopped_extension_is_said_when_its_artifacts_are_read(work, capsys):
    restore(Path("runs/second"))
    assert "not complete" not in capsys.readouterr().err
    Path("runs/second/done.json").unlink()
    restore(Path("runs/second"))
    assert "runs/second is not complete, and its artifacts are of step 2" in capsys.readouterr().err


def test_a_moved_run_is_used_from_another_folder(work, tmp_path, monkeypatch):
    here, _ = restore(Path("runs/second"))
    moved = Path("runs").rename(tmp_path / "moved")
    shutil.rmtree("data")
    monkeypatch.chdir(tmp_path)
    there, _ = restore(moved / "second")
    assert all(torch.equal(a, b) for a, b in zip(here.parameters(), there.parameters(), strict=True))
    assert there.language.tokenizer.get_vocab() == here.language.tokenizer.get_vocab()


def test_a_tokenizer_that_was_replaced_is_refused(work):
    path = Path("runs/second/tokenizers/language/tokenizer.json")
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match="tokenizer of 'language' is not the one that runs/second was trained with"):
        restore(Path("runs/second"))


def test_a_tokenizer_is_kept_once(work, tmp_path):
    model = nn.ModuleDict({"language": nn.Module()})
    model["language"].tokenizer = restore(Path("runs/second"))[0].language.tokenizer
    assert list(tokenizers_of(model)) == ["language"]
    keep_tokenizers(model, tmp_path)
    file = tmp_path / "tokenizers" / "language" / "tokenizer.json"
    file.write_text("kept")
    keep_tokenizers(model, tmp_path)
    assert file.read_text() == "kept"
