"""An adapter is what learns, and what a run leaves behind; merged, it is what was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mmlab.config.errors import ConfigError, RunError
from mmlab.model.config import LanguageModelConfig
from mmlab.model.language import LanguageModel, LanguageOnly
from mmlab.training.artifacts import describe_base, describe_frozen, save_parts
from mmlab.training.config import LoRAConfig
from mmlab.training.filling import fill_parts
from mmlab.training.lora import adapter_weights, add_adapters, is_adapted, merge_adapter, save_adapter
from mmlab.training.trainable import count_parameters, set_trainable
from mmlab.weights import CARD, read_as_stored
from tests.model import tiny
from tests.tiny_pictures import placed

PIXELS = torch.arange(2 * 3 * 16 * 16).remainder(251).to(torch.uint8).view(2, 3, 16, 16)
IDS = torch.arange(2 * 9).remainder(7).view(2, 9) + 3
PARTS = ["vision", "connector", "language"]


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.language.causal(inputs_embeds=embedded(model)).logits


def embedded(model: Any) -> torch.Tensor:
    return model.embed(IDS, model.features(PIXELS), *placed([(0, 1), (1, 2)], model.tokens_per_image).values())


def vlm(tokenizer: Path, eye: str = "clip", tongue: str = "llama", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return tiny.vlm(tokenizer, eye, tongue).eval()


@pytest.fixture
def base(tmp_path, tokenizer_folder) -> Path:
    """A run that has left all parts."""
    model = vlm(tokenizer_folder)
    save_parts(model, PARTS, tmp_path / "base" / "artifacts", {}, {})
    return tmp_path / "base"


def adapted(model: Any, runs: list[Path], folder: Path, *names: str, **settings: Any) -> tuple[Any, Path]:
    """The model with trained adapters on parts, and the run that has them and a trained connector."""
    sources = fill_parts(model, runs)
    set_trainable(model, ["connector", *names], names)
    bases = describe_base(model, names, sources)
    frozen = describe_frozen(model, ["connector", *names])
    add_adapters(model, {name: LoRAConfig(rank=4, alpha=8, **settings) for name in names})
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    save_parts(model, ["connector", *names], folder / "artifacts", {}, frozen, bases)
    return model.eval(), folder


@pytest.mark.parametrize(
    ("eye", "tongue", "names"),
    [("clip", "llama", ["language"]), ("siglip", "gpt2", ["vision", "language"]), ("blip2", "qwen2", ["vision"])],
)
def test_a_merged_adapter_is_what_was_trained(base, tmp_path, tokenizer_folder, eye, tongue, names):
    save_parts(vlm(tokenizer_folder, eye, tongue), PARTS, base / "artifacts", {}, {})
    model, run = adapted(vlm(tokenizer_folder, eye, tongue, 1), [base], tmp_path / "run", *names)
    merged = vlm(tokenizer_folder, eye, tongue, 2)
    before = {name: (weight, weight.requires_grad) for name, weight in merged.named_parameters()}
    fill_parts(merged, [base, run])
    assert {name: (weight, weight.requires_grad) for name, weight in merged.named_parameters()} == before
    torch.testing.assert_close(outputs(merged), outputs(model))
    alone = vlm(tokenizer_folder, eye, tongue, 2)
    fill_parts(alone, [base])
    alone.connector.load_state_dict(merged.connector.state_dict())
    assert (outputs(alone) - outputs(merged)).abs().max() > 0.01


def test_only_the_adapter_learns_and_it_begins_at_zero(base, tokenizer_folder):
    model = vlm(tokenizer_folder)
    fill_parts(model, [base])
    set_trainable(model, ["connector", "language"], ["language"])
    before, frozen = outputs(model), {name for name, _ in model.language.named_parameters()}
    add_adapters(model, {"language": LoRAConfig(rank=4)})
    assert torch.equal(outputs(model.eval()), before)
    learns = {name for name, weight in model.language.named_parameters() if weight.requires_grad}
    assert learns and all(".lora_" in name for name in learns)
    assert len(learns) == 2 * 2 * 7 and len(frozen) == len(list(model.language.named_parameters())) - len(learns)
    assert count_parameters(model)["language"]["trainable"] == 2 * 4 * (6 * 24 + 2 * 24 + 2 * (24 + 48) + (48 + 24))


def test_an_adapter_is_float32_whatever_it_is_put_on(base, tmp_path, tokenizer_folder):
    """Updates of 2e-4 would be lost in bf16; and the sum is rounded once, not the adapter before it."""
    _, run = adapted(vlm(tokenizer_folder), [base], tmp_path / "run", "language")
    model, exact, rounded = (vlm(tokenizer_folder) for _ in range(3))
    fill_parts(model, [base])
    set_trainable(model, ["language"], ["language"])
    add_adapters(model.to(torch.bfloat16), {"language": LoRAConfig(rank=4)})
    dtypes = {(weight.requires_grad, weight.dtype) for weight in model.language.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    fill_parts(exact, [base, run])
    fill_parts(rounded, [base])
    merge_adapter(rounded.language.to(torch.bfloat16), run / "artifacts" / "language")
    name = "causal.model.layers.0.mlp.up_proj.weight"
    one, other = (each.language.get_parameter(name).float() for each in (exact, rounded))
    assert 0 < (one - other).abs().max() <= 2**-8 * one.abs().max()


def test_weights_as_stored_show_neither_in_an_adapter_nor_in_a_sum(tmp_path, tokenizer_folder):
    """Each rank reads weights in the dtype of their file, before it casts its share."""
    stored = tiny.language(tokenizer_folder)
    stored.causal.half()
    stored.save(tmp_path / "model")
    (tmp_path / "adapter").mkdir()

    def read(as_stored: bool) -> LanguageOnly:
        model = LanguageOnly(LanguageModel(LanguageModelConfig(source=str(tmp_path / "model"))))
        if as_stored:
            read_as_stored(model)
        model.language.load_pretrained()
        return model

    adapters = []
    for as_stored in (False, True):
        model = read(as_stored)
        torch.manual_seed(1)
        add_adapters(model, {"language": LoRAConfig(rank=4, alpha=8)})
        assert model.language.causal.get_input_embeddings().weight.dtype == (torch.half if as_stored else torch.float)
        adapters.append(adapter_weights(model.language))
    assert all(torch.equal(adapters[0][name], weight) for name, weight in adapters[1].items())
    for weight in adapters[1].values():
        weight.detach().add_(0.01)
    save_adapter(model.language, tmp_path / "adapter", None)
    sums = [read(as_stored) for as_stored in (False, True)]
    for model in sums:
        merge_adapter(model.language, tmp_path / "adapter")
    whole, rounded = (model.language.state_dict() for model in sums)
    assert all(torch.equal(whole[name], value.float()) for name, value in rounded.items())


def test_layers_without_effect_get_no_adapter(monkeypatch, tokenizer_folder):
    """Data parallelism would fail without their gradients."""
    monkeypatch.setitem(tiny.VISION, "siglip", {**tiny.VISION["siglip"], "vision_use_head": True})
    model = vlm(tokenizer_folder, "siglip")
    set_trainable(model, ["vision", "connector"], ["vision"])
    add_adapters(model, {"vision": LoRAConfig(rank=4, dropout=0.0)})
    model.train()
    embedded(model).square().sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    assert is_adapted(model.vision) and not is_adapted(model.language)


@pytest.mark.parametrize("tongue", ["llama", "gpt2"])
def test_peft_alone_loads_the_folder(base, tmp_path, tokenizer_folder, tongue):
    from peft import PeftModel

    save_parts(vlm(tokenizer_folder, tongue=tongue), PARTS, base / "artifacts", {}, {})
    model, run = adapted(vlm(tokenizer_folder, tongue=tongue), [base], tmp_path / "run", "language")
    folder = run / "artifacts" / "language"
    assert {path.name for path in folder.iterdir()} == {CARD, "adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"]), "equal runs would have different files"
    source = config["base_model_name_or_path"]
    assert source == str(base / "artifacts" / "language")
    theirs: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model.language.causal(IDS).logits)


def test_adapters_of_several_runs_are_merged_in_their_order(base, tmp_path, tokenizer_folder):
    _, first = adapted(vlm(tokenizer_folder), [base], tmp_path / "first", "language")
    model, second = adapted(vlm(tokenizer_folder, seed=1), [base, first], tmp_path / "second", "language")
    merged = vlm(tokenizer_folder, seed=2)
    fill_parts(merged, [base, first, second])
    torch.testing.assert_close(outputs(merged), outputs(model))
    # There is no checkpoint of the weights that the second adapter was trained on.
    config = json.loads((second / "artifacts" / "language" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    for runs in ([base, second], [base, second, first]):
        with pytest.raises(ConfigError, match="second/artifacts/language is an adapter of another language"):
            fill_parts(vlm(tokenizer_folder), runs)
    whole = tmp_path / "whole"
    save_parts(merged, ["language"], whole / "artifacts", {}, {})
    fill_parts(other := vlm(tokenizer_folder, seed=3), [base, first, whole])
    assert torch.equal(other.language.causal(IDS).logits, merged.language.causal(IDS).logits)


def test_a_part_is_in_the_same_mode_after_an_adapter_was_read(base, tmp_path, tokenizer_folder):
    """Dropout is on while a part is trained, and off in a frozen one, whose adapter stays beside 4-bit weights."""
    pytest.importorskip("bitsandbytes")
    _, run = adapted(vlm(tokenizer_folder), [base], tmp_path / "run", "language", dropout=0.5)
    for quantize, learns in ((None, True), ("nf4", False)):
        model = vlm(tokenizer_folder)
        model.language.settings.quantize = quantize
        set_trainable(model, ["connector", "language"] if learns else ["connector"])
        fill_parts(model, [base, run])
        assert {module.training for name, module in model.language.causal.named_modules() if "base_" not in name} == {
            learns
        }


def test_a_connector_knows_the_adapter_that_it_was_trained_beside(base, tmp_path, tokenizer_folder):
    _, run = adapted(vlm(tokenizer_folder), [base], tmp_path / "run", "language")
    model = vlm(tokenizer_folder)
    fill_parts(model, [base, run])
    later = tmp_path / "later"
    save_parts(model, ["connector"], later / "artifacts", {}, describe_frozen(model, ["connector"]))
    fill_parts(vlm(tokenizer_folder), [base, run, later])
    with pytest.raises(ConfigError, match="later/artifacts/connector was trained with another language"):
        fill_parts(vlm(tokenizer_folder), [base, later])


def test_a_damaged_or_foreign_adapter_is_refused(base, tmp_path, tokenizer_folder):
    _, run = adapted(vlm(tokenizer_folder), [base], tmp_path / "run", "language")
    folder = run / "artifacts" / "language"
    config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(config.replace('"r": 4', '"r": 5'))
    with pytest.raises(RunError, match=r"adapter_config.json has changed"):
        fill_parts(vlm(tokenizer_folder), [base, run])
    card = json.loads((folder / CARD).read_text())
    del card["files"]
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(ConfigError, match=r"does not fit the model: .*lora_A.weight is \[4, 48\] there and \[5, 48\]"):
        fill_parts(vlm(tokenizer_folder), [base, run])


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [("q_proj", 2), (["q_proj", "v_proj"], 4), (["layers.0.mlp.up_proj"], 1), ("all-linear", 14)],
)
def test_targets(base, tokenizer_folder, targets, chosen):
    model = vlm(tokenizer_folder)
    set_trainable(model, ["language"], ["language"])
    add_adapters(model, {"language": LoRAConfig(rank=2, targets=targets)})
    assert len(adapter_weights(model.language)) == 2 * chosen


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], "stage.lora.language.targets: no layer is named 'q_prj'. Did you mean 'q_proj'?"),
        (["lm_head"], "no layer is named 'lm_head'. Layers: down_proj, gate_proj"),
        ([], "stage.lora.language.targets is empty"),
        (None, "stage.lora.language.targets is empty"),
        (5, "no layer is named '5'"),
    ],
)
def test_targets_that_match_nothing(tokenizer_folder, targets, message):
    model = vlm(tokenizer_folder)
    with pytest.raises(ConfigError) as error:
        add_adapters(model, {"language": LoRAConfig(targets=targets)})
    assert message in str(error.value)


def test_convolutions_have_to_be_named():
    eye = nn.ModuleDict({"vision": nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())})
    with pytest.raises(ConfigError, match="the part has no linear layers; name its convolutions"):
        add_adapters(eye, {"vision": LoRAConfig()})
    add_adapters(eye, {"vision": LoRAConfig(targets=["0"], rank=2)})
    assert is_adapted(eye["vision"])


def test_a_part_with_an_adapter_must_be_trained(tokenizer_folder):
    with pytest.raises(
        ConfigError, match=r"stage.lora names 'vision', which is not a part in stage.trainable\. Trained parts: con"
    ):
        set_trainable(vlm(tokenizer_folder), ["connector"], ["vision"])
