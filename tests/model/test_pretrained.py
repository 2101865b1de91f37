"""Parts with pretrained weights are built without them, and filled afterwards."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import mmlab
from mmlab.config.errors import ConfigError
from mmlab.model.autoencoder import KLAutoencoder
from mmlab.model.config import KLAutoencoderConfig, LanguageModelConfig, VisionEncoderConfig
from mmlab.model.language import LanguageModel
from mmlab.model.pretrained_tokenizer import load_tokenizer
from mmlab.model.vision import VisionEncoder
from mmlab.weights import content_hash
from tests.model import tiny, tiny_autoencoders
from tests.model.tiny_gguf import CHAT, write_gguf
from tests.tiny_hub import clip, publish
from tests.tiny_tokenizers import gpt_2


def parts(folder: Path, tokenizer: Path) -> dict[str, tuple[Any, Any]]:
    """Each saved part, and one that names it as its source."""
    folders = {name: str(folder / name) for name in ("vision", "language", "first_stage")}
    sources = {
        "vision": tiny.vision("siglip"),
        "language": tiny.language(tokenizer, "gpt2"),  # its output layer is tied to the embeddings
        "first_stage": tiny_autoencoders.kl(),
    }
    sources["language"].causal.generation_config.repetition_penalty = 1.25
    for name, part in sources.items():
        part.save(Path(folders[name]))
    before = torch.get_rng_state()
    made = {
        "vision": VisionEncoder(VisionEncoderConfig(source=folders["vision"])),
        "language": LanguageModel(LanguageModelConfig(source=folders["language"])),
        "first_stage": KLAutoencoder(KLAutoencoderConfig(source=folders["first_stage"])),
    }
    assert torch.equal(torch.get_rng_state(), before), "building them draws no random numbers"
    return {name: (sources[name], part) for name, part in made.items()}


@pytest.mark.parametrize("how", ["load_pretrained", "load"])
def test_parts_are_empty_until_they_are_filled(tmp_path, tokenizer_folder, how):
    for name, (source, part) in parts(tmp_path, tokenizer_folder).items():
        assert all(weight.is_meta for weight in part.parameters()), name
        part.requires_grad_(False)
        before = torch.get_rng_state()
        part.load_pretrained() if how == "load_pretrained" else part.load(tmp_path / name)
        assert torch.equal(torch.get_rng_state(), before), name
        assert not any(tensor.is_meta for tensor in [*part.parameters(), *part.buffers()]), name
        assert not any(weight.requires_grad for weight in part.parameters()), name
        assert list(part.state_dict()) == list(source.state_dict())
        assert all(
            torch.equal(a, b) for a, b in zip(part.state_dict().values(), source.state_dict().values(), strict=True)
        )


def test_a_filled_language_model_is_tied_and_generates_as_its_folder_says(tmp_path, tokenizer_folder):
    _, part = parts(tmp_path, tokenizer_folder)["language"]
    part.load_pretrained()
    assert part.causal.get_output_embeddings().weight is part.causal.get_input_embeddings().weight
    assert part.causal.generation_config.repetition_penalty == 1.25


def test_a_folder_with_a_weight_missing_is_refused(tmp_path, tokenizer_folder):
    from safetensors.torch import load_file, save_file

    _, part = parts(tmp_path, tokenizer_folder)["vision"]
    file = tmp_path / "vision" / "model.safetensors"
    weights = load_file(file)
    first = next(name for name in weights if "layers.0" in name)
    save_file({name: weight for name, weight in weights.items() if name != first}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="vision does not fill the model: 1 weights are missing, such as "):
        part.load_pretrained()


def test_random_parts_keep_their_weights():
    part: nn.Module = tiny.vision()
    before = {name: weight.clone() for name, weight in part.state_dict().items()}
    tiny.pretrained(part)
    assert all(torch.equal(weight, before[name]) for name, weight in part.state_dict().items())


def test_a_size_of_0_is_refused(tokenizer_folder):
    with pytest.raises(ConfigError, match="'llama' cannot be built with a size of 0"):
        config = {"model_type": "llama", "hidden_size": 0, "num_attention_heads": 2}
        LanguageModel(LanguageModelConfig(init="random", architecture=config, tokenizer=str(tokenizer_folder)))


def test_a_tokenizer_may_have_a_few_tokens_without_embedding(tokenizer_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.add_tokens(["<picture>"])
    tokenizer.save_pretrained(tmp_path)

    def model(vocabulary: int) -> LanguageModel:
        fields = {**tiny.LANGUAGE["llama"], "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        fields |= {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        return LanguageModel(LanguageModelConfig(init="random", architecture=fields, tokenizer=str(tmp_path)))

    assert model(size).tokenizer.pad_token == "</s>"  # padding is never attended to
    assert model(size).vocabulary == model(size + 2).vocabulary - 2 == size
    assert model(size + 2).tokenizer.pad_token == "<padding>"
    assert model(size + 64).vocabulary == size + 64
    with pytest.raises(
        ConfigError, match=rf"has {size + 2} tokens, the model only 100; set model\.language\.tokenizer"
    ):
        model(100)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_is_not_run_nor_asked_about(tmp_path, tokenizer_folder, monkeypatch, name):
    _, part = parts(tmp_path, tokenizer_folder)["language"]
    path = tmp_path / "language" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (path.parent / "evil.py").write_text("raise SystemExit('run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    for load in (
        part.load_pretrained,
        lambda: part.load(path.parent),
        lambda: LanguageModel(LanguageModelConfig(source=str(path.parent))),
    ):
        with pytest.raises(ConfigError, match=rf"{name} has 'auto_map'.* Such code is never run"):
            load()


def test_every_auto_class_is_told_not_to_run_code():
    calls = [
        (path.name, line)
        for path in Path(mmlab.__file__).parent.rglob("*.py")
        for line in re.findall(r"\bAuto\w+\.from_pretrained\([^\"].*", path.read_text(encoding="utf-8"))
    ]
    assert [call for call in calls if "NO_CODE" not in call[1] and "AutoencoderKL" not in call[1]] == []
    assert len(calls) >= 5


def test_a_damaged_tokenizer_is_one_sentence(tmp_path):
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}
    content = {"version": "1.0", "added_tokens": [], "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*out of vocabulary"):
        load_tokenizer(str(tmp_path))


def llama(tie: bool) -> Any:
    fields = {**tiny.LANGUAGE["llama"], "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tie}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("used", [torch.float32, torch.bfloat16])
def test_each_kind_of_file_fills_a_model(tmp_path, tokenizer_folder, kind, shards, dtype, used):
    torch.manual_seed(0)
    model = llama(tie=False)
    keys = {**model.config.to_dict(), "torch_dtype": str(dtype).removeprefix("torch.")}
    keys.pop("dtype")
    publish(tmp_path, model, keys, (kind,), shards, dtype)
    part = LanguageModel(LanguageModelConfig(source=str(tmp_path), tokenizer=str(tokenizer_folder)))
    part.causal.to(used)
    part.load_pretrained()
    for name, weight in part.causal.state_dict().items():
        assert weight.dtype == used
        assert torch.equal(weight, model.state_dict()[name].to(dtype).to(used)), name


@pytest.mark.parametrize("stored", ["config", "weights", "other keys"])
def test_quantized_weights_are_refused(tmp_path, tokenizer_folder, stored):
    model, tokenizer = llama(tie=False), str(tokenizer_folder)
    model.save_pretrained(tmp_path)
    if stored == "config":
        config = json.loads((tmp_path / "config.json").read_text())
        quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        (tmp_path / "config.json").write_text(json.dumps(config | quantized))
    else:
        (tmp_path / "model.safetensors").unlink()
        weights: dict = dict(model.state_dict())
        changed = {1: weights["lm_head.weight"]} if stored == "other keys" else {}
        integers = {} if changed else {"lm_head.weight": weights["lm_head.weight"].to(torch.int8)}
        torch.save({**weights, **changed, **integers}, tmp_path / "pytorch_model.bin")
    if stored == "other keys":
        LanguageModel(LanguageModelConfig(source=str(tmp_path), tokenizer=tokenizer)).load_pretrained()
        return
    with pytest.raises(ConfigError, match=r"has quantized weights \(gptq\)|lm_head.weight is torch.int8"):
        LanguageModel(LanguageModelConfig(source=str(tmp_path), tokenizer=tokenizer)).load_pretrained()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("both", [True, False])
def test_tied_weights_may_be_stored_under_one_name_or_both(tmp_path, tokenizer_folder, kind, both):
    model = llama(tie=True)
    table = model.get_input_embeddings().weight.detach()
    extra = {"lm_head.weight": table.half()} if both else {}
    publish(tmp_path, model, model.config.to_dict(), (kind,), 1, torch.float16, **extra)
    part = LanguageModel(LanguageModelConfig(source=str(tmp_path), tokenizer=str(tokenizer_folder)))
    part.causal.to(torch.bfloat16)
    part.load_pretrained()
    assert part.causal.get_output_embeddings().weight is part.causal.get_input_embeddings().weight
    assert torch.equal(part.causal.lm_head.weight, table.half().bfloat16())


def test_weights_that_need_no_cast_stay_in_their_file(tmp_path, tokenizer_folder):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no list of mappings")
    publish(tmp_path, model := llama(tie=False), model.config.to_dict(), ("safetensors",), 1, torch.float32)
    content = (tmp_path / "model.safetensors").read_bytes()
    part = LanguageModel(LanguageModelConfig(source=str(tmp_path), tokenizer=str(tokenizer_folder)))
    part.load_pretrained()
    lines = [line.split()[0] for line in maps.read_text().splitlines() if str(tmp_path) in line]
    spans = [tuple(int(end, 16) for end in line.split("-")) for line in lines]
    assert all(any(a <= weight.data_ptr() < b for a, b in spans) for weight in part.parameters())
    with torch.no_grad():
        part.causal.lm_head.weight.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == content


def test_a_tower_is_found_in_a_checkpoint_of_both_and_transformers_lists_nothing(tmp_path, capfd):
    clip(tmp_path, 28, ("bin",))
    part = VisionEncoder(VisionEncoderConfig(source=str(tmp_path)))
    capfd.readouterr()
    part.load_pretrained()
    stored = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert torch.equal(
        part.tower.state_dict()["embeddings.class_embedding"], stored["vision_model.embeddings.class_embedding"]
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("packed", [False, True])
def test_a_gguf_file_gives_weights_tokenizer_and_chat_template(tmp_path, packed):
    weights = write_gguf(tmp_path / "tiny.gguf", gpt_2(), packed)
    part = LanguageModel(LanguageModelConfig(source=str(tmp_path / "tiny.gguf")))
    part.load_pretrained()
    for name, weight in part.causal.state_dict().items():
        if packed:
            assert 0 < (weight - weights[name]).abs().max() < 0.02 or weight.ndim == 1, name
        else:
            assert torch.equal(weight, weights[name]), name
    assert part.causal.lm_head.weight is part.causal.get_input_embeddings().weight
    assert part.tokenizer.chat_template == CHAT
    text = "What's in the picture?  3 × 猫\n</s>"
    assert part.tokenizer(text)["input_ids"] == gpt_2()(text)["input_ids"]
    (tmp_path / "saved").mkdir()
    part.save(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = LanguageModel(LanguageModelConfig(source=str(tmp_path / "saved")))
    again.load_pretrained()
    assert content_hash(again) == content_hash(part)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.gguf", r"missing\.gguf cannot be loaded: there is no such file; its folder has damaged\.gguf\.$"),
        ("damaged.gguf", r"damaged\.gguf cannot be loaded: .*GGUF"),
    ],
)
def test_a_gguf_file_that_cannot_be_read_is_one_sentence(tmp_path, name, message):
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ConfigError, match=message) as caught:
        LanguageModel(LanguageModelConfig(source=str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_a_source_without_weights_lists_what_it_has(tmp_path, tokenizer_folder):
    llama(tie=False).config.save_pretrained(tmp_path)
    (tmp_path / "tf_model.h5").touch()
    part = LanguageModel(LanguageModelConfig(source=str(tmp_path), tokenizer=str(tokenizer_folder)))
    reason = r"it has no model\.safetensors or pytorch_model\.bin, nor an index.*; it has config\.json, tf_model\.h5\.$"
    for fill, name in (
        (part.load_pretrained, rf"model\.language\.source={tmp_path}"),
        (lambda: part.load(tmp_path), tmp_path),
    ):
        with pytest.raises(ConfigError, match=rf"^{name} cannot be loaded: {reason}"):
            fill()


def test_buffers_that_are_no_weights_stay_exact_in_bf16(tokenizer_folder):
    model = tiny.vlm(tokenizer_folder)
    before = {
        name: value.clone()
        for name, value in model.named_buffers()
        if name not in model.state_dict() and value.dtype.is_floating_point
    }
    assert any("inv_freq" in name for name in before) and "vision.mean" in before
    model.to(torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    for name, value in before.items():
        assert torch.equal(model.get_buffer(name), value)
