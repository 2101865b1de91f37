"""`mmlab convert`: its command line, and the commands that use a converted LLaVA."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image

from mmlab import cli
from mmlab.runs.run import load_run_config
from mmlab.training.artifacts import content_hashes
from tests.model import tiny_llava as tiny
from tests.tiny_shapes import make_shapes

CPU = "trainer.accelerator=cpu"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A converted LLaVA in `runs`, and a projector; shards and a picture beside them."""
    root = tmp_path_factory.mktemp("work")
    model = tiny.tiny_model()
    tiny.port(root / "port", model)
    eye, base = tiny.tower(root / "eye", model), tiny.base(root / "base", model)
    tiny.projector(root / "projector", model, eye, base)
    tiny.lora(root / "lora", model, eye, base)
    tiny.own(root / "linear", tiny.tiny_model("linear"), eye)
    make_shapes(root / "shapes")
    Image.new("RGB", (40, 20), "red").save(root / "photo.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in ("port", "projector", "lora", "linear"):
            assert cli.main(["convert", "llava", name, f"runs/{name}"]) == 0
    return root


def test_it_answers_and_is_scored(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    for name in ("port", "lora"):
        assert cli.main(["chat", f"run={name}", "image=photo.png", "question=what?", "max_new_tokens=4", CPU]) == 0
        assert capsys.readouterr().out.strip()
        scored = ["eval", f"run={name}", "data.path=shapes/val", "max_new_tokens=4", f"out={name}_scores", CPU]
        assert cli.main(scored) == 0
        assert json.loads((work / f"{name}_scores" / "scores.json").read_text())["questions"] > 0


@pytest.mark.parametrize("name", ["port", "linear"])
def test_what_is_exported_comes_back(work, monkeypatch, name):
    monkeypatch.chdir(work)
    assert cli.main(["export", f"run={name}", "to=transformers", f"out={name}_out"]) == 0
    assert cli.main(["convert", "llava", f"{name}_out", f"runs/{name}_again"]) == 0
    before, after = (work / "runs" / each for each in (name, f"{name}_again"))
    assert content_hashes(before) == content_hashes(after)
    tokenizers = [json.loads((run / "identity.json").read_text())["tokenizers"] for run in (before, after)]
    assert tokenizers[0] == tokenizers[1]
    configs = [load_run_config(run) for run in (before, after)]
    assert configs[0].stage.prompt == configs[1].stage.prompt and configs[0].data.aspect == configs[1].data.aspect
    assert configs[0].model.connector == configs[1].model.connector


def test_what_a_port_cannot_say_of_itself(work, tmp_path, capsys):
    apart = shutil.copytree(work / "port", tmp_path / "apart")
    (apart / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'][1]['text'] }}"}))
    (apart / "tokenizer_config.json").write_text(
        json.dumps({**json.loads((apart / "tokenizer_config.json").read_text()), "chat_template": None})
    )
    assert cli.main(["convert", "llava", str(apart), str(tmp_path / "run")]) == 0
    assert "no template here writes what the chat template of" in capsys.readouterr().err
    (apart / "adapter").mkdir()
    (apart / "adapter" / "adapter_config.json").write_text("{}")
    assert cli.main(["convert", "llava", str(apart), str(tmp_path / "other")]) == 2
    assert "has an adapter beside its weights, which is not read" in capsys.readouterr().err


def train(*argv: str) -> int:
    data = ["data=shapes", "data.root=shapes", "data.global_batch=2", "data.micro_batch=2", "data.max_length=512"]
    callbacks = ["callbacks.samples=null", "trainer.max_steps=1", CPU]
    parts = ["model=llava", "model/vision=pretrained", "model/language=vicuna_7b_v15", "stage.prompt.template=v1"]
    return cli.main(["train", *parts, *data, *callbacks, *argv])


def test_training_starts_from_it(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    sources = [f"model.{part}.source=runs/port/artifacts/{part}" for part in ("vision", "language")]
    assert train("stage=finetune", "stage.init_from=[port]", *sources, "run.name=continued", "optim.lr=1e-2") == 0
    before, after = content_hashes(work / "runs" / "port"), content_hashes(work / "runs" / "continued")
    assert before["vision"] == after["vision"] and before["language"] != after["language"]
    sources = ["model.vision.source=eye", "model.language.source=base"]
    assert train("stage=finetune", "stage.init_from=[projector]", *sources, "run.name=second") == 0
    trained = json.loads((work / "runs" / "second" / "identity.json").read_text())
    assert trained["sources"] == {"connector": "runs/projector/artifacts/connector"}
    # An adapter is merged into its base, and trained on from there.
    assert train("stage=finetune", "stage.init_from=[lora]", *sources, "run.name=third") == 0
    assert json.loads((work / "runs" / "third" / "done.json").read_text())["steps"] == 1


def test_a_part_is_checked_against_the_tower_it_was_trained_with(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    tiny.tower(work / "other_eye", tiny.tiny_model(seed=1))
    sources = ["model.vision.source=other_eye", "model.language.source=base"]
    assert train("stage=finetune", "stage.init_from=[projector]", *sources, "run.name=wrong") == 2
    assert "was trained with another vision: its content_hash was" in capsys.readouterr().err


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "llava").mkdir()
    for argv, sentence in (
        (["lava", "llava", "out"], "mmlab convert knows llava and taming, not 'lava'. Did you mean 'llava'?"),
        ([], "the following arguments are required: kind; see `mmlab convert --help`."),
        (["llava", "x"], "the following arguments are required: out; see `mmlab convert --help`."),
        (["llava", "lava", "out"], "There is no checkpoint lava. Did you mean 'llava'?"),
        (["llava", "llava", "full"], "full is not empty; choose another folder, or remove it."),
        (["llava", "llava", "out", "--template", "v11"], "'prompt.template' cannot be 'v11'. Did you mean 'v1'?"),
        (["llava", "llava", "out", "--aspect", "padded"], "invalid choice: 'padded'"),
    ):
        assert cli.main(["convert", *argv]) == 2
        error = capsys.readouterr().err
        assert sentence in error and "Traceback" not in error, error
    for argv in ([], ["llava"], ["taming"]):
        assert cli.main(["convert", *argv, "--help"]) == 0
        assert "usage: mmlab convert" in capsys.readouterr().out


def test_a_tower_that_is_not_here(work, tmp_path, capsys):
    model = tiny.tiny_model()
    tiny.own(tmp_path / "own", model, "./checkpoints/my-eye")
    assert cli.main(["convert", "llava", str(tmp_path / "own"), str(tmp_path / "out")]) == 2
    assert "./checkpoints/my-eye, which is not here; give its folder or hub name as --vision" in capsys.readouterr().err
    tiny.own(tmp_path / "hub", model, "./checkpoints/clip-vit-large-patch14-336")
    assert cli.main(["convert", "llava", str(tmp_path / "hub"), str(tmp_path / "run")]) == 0
    assert "vision: openai/clip-vit-large-patch14-336" in capsys.readouterr().out
    card = json.loads((tmp_path / "run" / "artifacts" / "language" / "card.json").read_text())
    assert card["against"]["vision"]["feature_layer"] == -2 and "content_hash" not in card["against"]["vision"]


def test_a_name_on_the_hub(work, tmp_path, monkeypatch, capsys):
    asked = {}

    def snapshot(name, allow_patterns, ignore_patterns):
        asked.update(name=name, allowed=allow_patterns, ignored=ignore_patterns)
        return str(work / "port")

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: ["model-00001-of-00003.safetensors", "x.bin"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert cli.main(["convert", "llava", "llava-hf/llava-1.5-7b-hf", str(tmp_path / "run")]) == 0
    assert asked["name"] == "llava-hf/llava-1.5-7b-hf" and asked["ignored"] == ["pytorch_model.bin*", "pytorch_model-*"]
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: [][1])
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    assert cli.main(["convert", "llava", "llava-hf/gone", str(tmp_path / "other")]) == 2
    assert "no folder llava-hf/gone, and it cannot be read from the hub: list index" in capsys.readouterr().err


def test_damaged_configs(work, tmp_path, capsys):
    for name, file, content, sentence in (
        ("port", "config.json", "[]", "config.json is not a mapping."),
        ("port", "config.json", "{", "config.json cannot be read"),
        ("lora", "adapter_config.json", "{}", "has no r, so it is not LoRA's."),
        ("lora", "config.json", '{"model_type": "llama"}', "is an adapter, but not one of LLaVA"),
    ):
        folder = shutil.copytree(work / name, tmp_path / "it")
        (folder / file).write_text(content)
        assert cli.main(["convert", "llava", str(folder), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert sentence in error and "Traceback" not in error, error
        shutil.rmtree(folder)


def test_an_adapter_without_its_base(work, tmp_path, capsys):
    tiny.lora(tmp_path / "lora", tiny.tiny_model(), work / "eye", "./gone")
    assert cli.main(["convert", "llava", str(tmp_path / "lora"), str(tmp_path / "out")]) == 2
    assert "is an adapter of ./gone, which is not here; give its base" in capsys.readouterr().err
    assert cli.main(["convert", "llava", str(tmp_path / "lora"), str(tmp_path / "out"), "--base", "./none"]) == 2
    assert (
        "There is no folder ./none; give the language model's folder or hub name as --base" in capsys.readouterr().err
    )
    wrong = tiny.base(tmp_path / "base", tiny.tiny_model())
    state = torch.load(wrong / "pytorch_model-00001-of-00002.bin")
    state = {name: value[:, :-8] if "q_proj" in name else value for name, value in state.items()}
    torch.save(state, wrong / "pytorch_model-00001-of-00002.bin")
    argv = ["convert", "llava", str(tmp_path / "lora"), str(tmp_path / "out"), "--base", str(wrong)]
    assert cli.main(argv) == 2
    assert "give the base that the adapter was trained on" in capsys.readouterr().err
