"""Adapters through the commands: trained, evaluated, and the start of a later stage; test_resume kills such a run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlab import cli
from mmlab.stage.assembly import restore
from mmlab.training.checkpoint_folder import newest_whole
from mmlab.training.checkpoint_io import read
from mmlab.training.lora import is_adapted
from tests.tiny_commands import carry_out
from tests.tiny_shapes import make_shapes

SIZE = "{hidden_size:32,intermediate_size:64,num_hidden_layers:1,num_attention_heads:2}"
SMALL = f"model.language.architecture={SIZE} data.workers=0 data.global_batch=4 data.micro_batch=2"
SMALL += " data.max_length=200 trainer=cpu callbacks.samples=null"
TINY = f"{SMALL} trainer.max_steps=2 data.root=shapes"
LORA = "+stage.lora.language.rank=4 +stage.lora.language.dropout=0.2"
IDS = torch.arange(18).remainder(50).view(2, 9) + 3


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A language model, and runs with an adapter on it."""
    folder = tmp_path_factory.mktemp("work")
    make_shapes(folder / "shapes", train=12, val=4, size=64)
    tuned = f"train experiment=llava/finetune_tiny {TINY} stage.init_from=[tongue] {LORA}"
    return carry_out(
        folder,
        [
            f"train experiment=llava/language_tiny {TINY} run.name=tongue",
            f"{tuned} run.name=lora",
            f"{tuned} model.language.quantize=nf4 run.name=qlora",
        ],
    )


def card(work: Path, run: str) -> dict[str, Any]:
    """The card of a run's language model, or of its adapter."""
    return json.loads((work / "runs" / run / "artifacts" / "language" / "card.json").read_text())


@pytest.mark.parametrize("run", ["lora", "qlora"])
def test_checkpoints_and_artifacts_have_the_adapter_alone(work, run):
    newest = newest_whole(work / "runs" / run / "checkpoints", pytest.fail)
    assert newest is not None
    learnt = [name for name in read(newest)["state_dict"] if name.startswith("model.language.")]
    assert learnt and all(".lora_" in name for name in learnt)
    artifact = work / "runs" / run / "artifacts" / "language"
    names = {path.name for path in artifact.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "card.json"}
    assert card(work, run)["base"]["content_hash"] == card(work, "tongue")["content_hash"]


def test_a_run_is_evaluated_with_its_adapter(work, monkeypatch):
    monkeypatch.chdir(work)
    logits: dict[str, Any] = {}
    for run in ("tongue", "lora", "qlora"):
        model: Any = restore(Path("runs", run))[0].language
        assert is_adapted(model) == (run == "qlora")
        logits[run] = model.causal(IDS).logits.detach()
    plain: Any = restore(Path("runs/qlora"), quantized=False)[0].language
    torch.testing.assert_close(plain.causal(IDS).logits.detach(), logits["qlora"])
    assert not is_adapted(plain)
    assert len({float(each.sum()) for each in logits.values()}) == 3
    assert cli.main(["eval", "run=lora", "data.path=shapes/val", "trainer.accelerator=cpu", "max_new_tokens=2"]) == 0
    assert cli.main(["eval", "run=qlora", "data.path=shapes/val", "trainer.accelerator=cpu", "max_new_tokens=2"]) == 0


@pytest.mark.parametrize("first", ["lora", "qlora"])
def test_a_later_stage_starts_from_the_sum(work, monkeypatch, capsys, first):
    monkeypatch.chdir(work)
    later = f"train experiment=llava/finetune_tiny {TINY} {LORA} stage.init_from=[tongue,{first}]"
    later += f" run.name=after_{first}"
    assert cli.main(later.split()) == 0
    base = card(work, f"after_{first}")["base"]
    # There is no checkpoint of the sum.
    assert (base["content_hash"], base["source"]) == (card(work, first)["content_hash"], None)
    capsys.readouterr()
    assert cli.main([*later.replace("after_", "no_").split(), "model.language.quantize=nf4"]) == 2
    assert "has an adapter of an earlier run, which cannot be merged into 4-bit weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "+stage.lora.language.rank=4 stage.trainable=[connector]",
            "names 'language', which is not a part in stage.trainable",
        ),
        ("+stage.lora.langage.rank=4", "stage.lora: the model has no part 'langage'. Did you mean 'language'?"),
        ("+stage.lora.language.rnk=4", "There is no key 'stage.lora.language.rnk'. Did you mean 'rank'?"),
        ("+stage.lora.language=4", "'stage.lora.language' is a section with its own keys"),
        ("stage.lora.language.rank=4", "There is no key 'stage.lora.language' yet; add it with +stage.lora.language"),
        ("+stage.lora.language.targets=[q_prj]", "no layer is named 'q_prj'. Did you mean 'q_proj'?"),
        ("+stage.lora.language.rank=4 stage.init_from=[]", "stage.lora.language: the part has random weights"),
        ("model.language.quantize=nf4", "4-bit weights cannot be trained; add an adapter with +stage.lora.language"),
        (f"model.language.quantize=nf4 {LORA} trainer.precision=64-true", "computes in at most 32 bits"),
        (
            "model.language.source=runs/lora/artifacts/language",
            "'model.language.source': runs/lora/artifacts/language is an adapter, not a whole model",
        ),
        ("model.language.quantize=nf5", "'model.language.quantize' cannot be 'nf5'. Did you mean 'nf4'?"),
    ],
)
def test_settings_that_cannot_be(work, monkeypatch, capsys, options, message):
    monkeypatch.chdir(work)
    command = f"train experiment=llava/finetune_tiny {TINY} run.name=refused stage.init_from=[tongue] {options}"
    assert cli.main(command.split()) == 2
    assert message in capsys.readouterr().err


def test_quantizing_without_bitsandbytes_is_refused(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    monkeypatch.setattr("mmlab.runs.check.find_spec", lambda name: None)
    command = f"train experiment=llava/finetune_tiny {TINY} stage.init_from=[tongue] {LORA} model.language.quantize=nf4"
    assert cli.main([*command.split()]) == 2
    assert "model.language.quantize=nf4 needs bitsandbytes: pip install 'mmlab[qlora]'" in capsys.readouterr().err


def test_plan_counts_adapters_and_bits(capsys):
    """Four layers of a language model of 7 B have an eighth of its adapters and of its 4-bit weights."""
    layers = [f"model.{part}.architecture.num_hidden_layers=4" for part in ("vision", "language")]
    sizes = {}
    for name, bits in (("lora", "null"), ("qlora", "nf4")):
        assert cli.main(["plan", "experiment=llava/v15_7b_lora", *layers, f"model.language.quantize={bits}"]) == 0
        out = capsys.readouterr().out
        assert "language            39,976,960   1,071,681,536" in out
        sizes[name] = float(re.findall(r"^  weights +([\d.]+)$", out, re.MULTILINE)[0])
    assert sizes["lora"] - sizes["qlora"] == pytest.approx(6_476_005_376 / 8 * (2 - 4.127 / 8) / 2**30, abs=0.02)
