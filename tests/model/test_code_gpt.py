"""The transformer over codes: causal, told by its condition, the same with a cache and as transformers' GPT-2."""

from typing import Any

import pytest
import torch
from torch import nn

from mmlab.config.errors import ConfigError
from mmlab.model.autoencoder import VQAutoencoder
from mmlab.model.code_gpt import Cache, CodeGPT
from mmlab.model.code_prior_model import CodePriorModel
from mmlab.model.conditioner import NoCondition
from mmlab.model.config import CodeGPTConfig, VectorQuantizerConfig, VQAutoencoderConfig
from mmlab.model.denoiser import DiffusionModel
from mmlab.model.quantizer import VectorQuantizer
from tests.model import tiny_autoencoders as tiny
from tests.model.tiny_priors import CODES, KINDS, SIDE, conditioner, conditions, prior_model, some_codes

POSITIONS = ("learned", "rotary")


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_changes_nothing(kind, positions, tokenizer_folder):
    model = prior_model(kind, tokenizer_folder, positions=positions)
    condition, _ = conditions(model)
    codes, cache = some_codes(), Cache()
    whole = model(codes, condition)
    assert whole.shape == (3, SIDE * SIDE, CODES)
    hidden = model.prior.read(codes[:, :3], condition, cache)
    torch.testing.assert_close(model.prior.logits(hidden), whole[:, :4], rtol=1e-4, atol=1e-5)
    for n in range(3, SIDE * SIDE - 1):
        after = model.prior.logits(model.prior.extend(codes[:, n], cache))
        torch.testing.assert_close(after, whole[:, n + 1], rtol=1e-4, atol=1e-5)
    assert cache.length == model.prior.room


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_see_the_condition_and_the_codes_before(kind, positions, tokenizer_folder):
    model = prior_model(kind, tokenizer_folder, positions=positions)
    (condition, null), codes = conditions(model), some_codes()
    logits = model(codes, condition)
    for n in (0, 5, SIDE * SIDE - 1):
        changed = codes.clone()
        changed[:, n] = (changed[:, n] + 1) % CODES
        differs = (model(changed, condition) - logits).abs().amax((0, 2))
        assert (differs[: n + 1] < 1e-6).all() and (differs[n + 1 :] > 1e-5).all()
    apart = (model(codes, null) - logits).abs().amax(2)
    assert (apart[:2] > 1e-4).all() if kind != "none" else (apart == 0).all()


@torch.no_grad()
def test_hidden_padding_is_not_seen(tokenizer_folder):
    for kind, same in (("hidden", True), ("text", False)):
        model = prior_model(kind, tokenizer_folder)
        condition, _ = conditions(model, 1)
        changed = {**condition, "context": condition["context"].clone()}
        changed["context"][:, -1] += 1
        logits = [model(some_codes(1), one) for one in (condition, changed)]
        assert torch.allclose(*logits, atol=1e-6) is same


@torch.no_grad()
def test_rotary_positions_are_relative():
    """Within the picture attention depends on how far apart rows and columns are, not on where they are."""
    model = prior_model("none", positions="rotary", side=6)
    angles = model.prior._angles(torch.device("cpu"))[1:]  # the start token has no position
    cos = lambda a, b: (angles[a] - angles[b]).cos()  # noqa: E731
    torch.testing.assert_close(cos(1, 8), cos(14, 21))
    assert not torch.allclose(cos(1, 8), cos(1, 7))
    aligned = prior_model("map", positions="rotary").prior._angles(torch.device("cpu"))
    torch.testing.assert_close(aligned[: SIDE * SIDE - 1], aligned[SIDE * SIDE + 1 :])


@torch.no_grad()
def test_it_is_gpt_2():
    from transformers import GPT2Config, GPT2LMHeadModel

    prior: Any = prior_model("none").prior
    config = GPT2Config(vocab_size=CODES + 1, n_positions=prior.room, n_embd=32, n_layer=2, n_head=2)
    config.activation_function, config.tie_word_embeddings = "gelu", False
    reference: Any = GPT2LMHeadModel(config).eval()
    weights = {"wpe.weight": prior.positions, "wte.weight": torch.cat([prior.embed.weight, prior.start[None]])}
    for i, block in enumerate(prior.blocks):
        parts = (block.query, block.key, block.value)
        weights |= {f"h.{i}.attn.c_attn.weight": torch.cat([part.weight for part in parts]).T}
        weights |= {f"h.{i}.attn.c_attn.bias": torch.cat([part.bias for part in parts])}
        for name, layer in {"attn.c_proj": block.out, "mlp.c_fc": block.mlp[0], "mlp.c_proj": block.mlp[2]}.items():
            weights |= {f"h.{i}.{name}.weight": layer.weight.T, f"h.{i}.{name}.bias": layer.bias}
        for name, layer in {"ln_1": block.norm, "ln_2": block.mlp_norm}.items():
            weights |= {f"h.{i}.{name}.weight": layer.weight, f"h.{i}.{name}.bias": layer.bias}
    weights |= {"ln_f.weight": prior.norm.weight, "ln_f.bias": prior.norm.bias}
    reference.transformer.load_state_dict(weights)
    codes = some_codes()
    theirs = reference.transformer(torch.cat([torch.full((3, 1), CODES), codes[:, :-1]], 1)).last_hidden_state
    torch.testing.assert_close(prior.head(theirs), prior(codes, {}), rtol=1e-4, atol=1e-5)


def test_every_weight_learns():
    for kind in ("none", "class", "context", "map"):
        model = prior_model(kind).train()
        model(some_codes(), conditions(model)[0]).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.prior.parameters()), kind


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CodeGPT(CodeGPTConfig(width=30, heads=4), 4), "width=30 must be a multiple of heads=4"),
        (lambda: CodeGPT(CodeGPTConfig(positions="rotray"), 4), "Did you mean 'rotary'"),
        (lambda: CodeGPT(CodeGPTConfig(width=12, heads=2, positions="rotary"), 4), "a width divisible by 4, not 6"),
        (lambda: DiffusionModel(tiny.kl(), conditioner("map"), nn.Identity), "map is only for model=code_prior"),
        (lambda: CodePriorModel(tiny.kl(), NoCondition(), CodeGPT), "KLAutoencoder has no codes; choose"),
        (lambda: CodePriorModel(tiny.vq(), NoCondition(), CodeGPT, tiny.vq()), "is set, but .* reads no maps"),
        (lambda: CodePriorModel(tiny.vq(), conditioner("map"), CodeGPT), "so model.map_stage must be a first stage"),
        (lambda: CodePriorModel(tiny.vq(), conditioner("map"), CodeGPT, shallow()), "has 2 pixels per code and"),
        (lambda: CodePriorModel(tiny.vq(), conditioner("map"), CodeGPT, tiny.vq(codes=9)), "codes=16, but .* has 9"),
    ],
)
def test_what_does_not_fit_is_one_sentence(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def shallow() -> VQAutoencoder:
    """A first stage with a factor of 2."""
    sizes = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    book = VectorQuantizer(VectorQuantizerConfig(codes=16, width=4))
    return VQAutoencoder(VQAutoencoderConfig(architecture=sizes), book)
