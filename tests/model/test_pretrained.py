"""Parts with pretrained weights are built without them, and filled afterwards."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

import mmlab
from mmlab.config.errors import ConfigError
from mmlab.model.autoencoder import KLAutoencoder
from mmlab.model.config import KLAutoencoderConfig, LanguageModelConfig, VisionEncoderConfig
from mmlab.model.language import LanguageModel
from mmlab.model.pretrained_tokenizer import load_tokenizer
from mmlab.model.vision import VisionEncoder
from tests.model import tiny, tiny_autoencoders


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
        for line in re.findall(r"\bAuto\w+\.from_pretrained\(.*", path.read_text(encoding="utf-8"))
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
