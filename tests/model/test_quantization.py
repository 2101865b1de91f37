"""4-bit weights: what is rounded, what is not, and that a model is identified by what was stored."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmlab.config.errors import ConfigError
from mmlab.model.config import LanguageModelConfig
from mmlab.model.language import LanguageModel
from mmlab.weights import content_hash
from tests.model import tiny

bnb = pytest.importorskip("bitsandbytes")
IDS = torch.arange(18).remainder(50).view(2, 9) + 3


@pytest.fixture(scope="module")
def stored(tmp_path_factory, tokenizer_folder) -> Path:
    """A checkpoint in bf16."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("language")
    language = tiny.language(tokenizer_folder)
    language.to(torch.bfloat16).save(folder)
    return folder


def load(folder: Path, quantize: str | None) -> LanguageModel:
    return tiny.pretrained(LanguageModel(LanguageModelConfig(source=str(folder), quantize=quantize)))


def test_linear_layers_are_rounded_and_the_rest_stays(stored):
    whole, rounded = load(stored, None), load(stored, "nf4")
    layers = {name: layer for name, layer in rounded.causal.named_modules() if isinstance(layer, nn.Linear)}
    four_bit = {name for name, layer in layers.items() if isinstance(layer, bnb.nn.Linear4bit)}
    assert len(four_bit) == 14 and set(layers) - four_bit == {"lm_head"}
    exact = dict(whole.causal.named_parameters())
    for name, weight in rounded.causal.named_parameters():
        if name.removesuffix(".weight") not in four_bit:
            assert weight.dtype == torch.float32 and torch.equal(weight, exact[name])
    assert content_hash(rounded) == content_hash(whole)
    with torch.no_grad():
        error = (rounded.causal(IDS).logits - whole.causal(IDS).logits).abs().max()
    assert 0 < error < 0.1 * whole.causal(IDS).logits.abs().max()


def test_the_same_model_whether_it_was_filled_from_meta_or_over_weights(stored, tokenizer_folder):
    """A run's config may build a part with random weights, which an artifact then replaces."""
    one, other = load(stored, "nf4"), tiny.language(tokenizer_folder)
    other.settings.quantize = "nf4"
    other.load(stored)
    assert content_hash(one) == content_hash(other)
    with torch.no_grad():
        assert torch.equal(one.causal(IDS).logits, other.eval().causal(IDS).logits)


def test_evaluation_does_not_change_what_training_computes(stored):
    """On some CPUs bitsandbytes packs weights anew, and rounds their scales, in a forward pass without gradients."""
    rounded = load(stored, "nf4")
    embeds = rounded.embed(IDS).detach().requires_grad_(True)
    before = rounded.causal(inputs_embeds=embeds).logits.detach()
    with torch.no_grad():
        torch.testing.assert_close(rounded.causal(IDS).logits, before)
    assert torch.equal(rounded.causal(inputs_embeds=embeds).logits.detach(), before)


def test_dequantized_weights_compute_the_same(stored):
    rounded = load(stored, "nf4")
    with torch.no_grad():
        before = rounded.causal(IDS).logits
        rounded.dequantize()
        torch.testing.assert_close(rounded.causal(IDS).logits, before)
    assert {type(m) for m in rounded.causal.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    again = rounded.causal.get_submodule("model.layers.0.mlp.up_proj").weight
    assert not torch.equal(again, load(stored, None).causal.get_submodule("model.layers.0.mlp.up_proj").weight)
    rounded.dequantize()  # which changes nothing


def test_a_model_without_linear_layers_is_refused(tmp_path, tokenizer_folder):
    tiny.language(tokenizer_folder, "gpt2").save(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match=r"model.language.quantize: a gpt2 has no linear layers"):
        load(tmp_path / "gpt2", "nf4")


MEASURE = """
import ctypes, sys, torch, bitsandbytes
from transformers import LlamaConfig, LlamaForCausalLM
from mmlab.model.pretrained import load_weights
from mmlab.model.quantization import quantize
held = lambda: int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(sys.argv[1])).eval()
before = held()
load_weights(model, sys.argv[1], as_stored=True)
mapped = held() - before
quantize(model, torch.float16)
ctypes.CDLL(None).malloc_trim(0)  # what is freed counts until the allocator returns it
print(mapped, held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_loading_holds_no_copy_of_the_weights(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    config: Any = LlamaConfig.from_dict({**size, "vocab_size": 64})
    LlamaForCausalLM(config).half().save_pretrained(tmp_path)
    total = (tmp_path / "model.safetensors").stat().st_size
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    mapped, rounded = map(int, done.stdout.split())
    assert total > 60e6 and mapped < 0.2 * total and rounded < 0.6 * total
