"""The diffusion transformer beside diffusers' one, and what the paper says of its start."""

import pytest
import torch
from torch import nn

from mmlab.config.errors import ConfigError
from mmlab.export.diffusers_modules import transformer
from mmlab.model.conditioner import ClassCondition
from mmlab.model.config import ClassConditionConfig, DiTConfig
from mmlab.model.dit import DiT, attend, patches, pixels, position_embedding

TIME = torch.tensor([0, 7, 999])
CLASSES = torch.tensor([0, 3, 5])


def randomise(module: nn.Module) -> None:
    """adaLN-Zero hides every block behind zeros; with random weights everything shows."""
    torch.manual_seed(2)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)


def dit(**options) -> DiT:
    torch.manual_seed(0)
    widths = {name: options.pop(name, None) for name in ("vector_width", "context_width")}
    channels = options.pop("channels", 3)
    return DiT(DiTConfig(**{"depth": 3, "width": 32, "heads": 4, "patch": 2, **options}), channels, **widths).eval()


def x(height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("vector", [32, 20])
@pytest.mark.parametrize("patch", [1, 2, 4])
@torch.no_grad()
def test_diffusers_computes_the_same(vector, patch):
    """Both the width that is added as it is, and one behind a linear layer."""
    ours = dit(vector_width=vector, patch=patch)
    conditioner = ClassCondition(ClassConditionConfig(classes=5, width=vector))
    randomise(ours)
    randomise(conditioner)
    theirs = transformer(ours, conditioner, 8)
    answer = ours(x(), TIME, conditioner({"labels": CLASSES}))
    expected = theirs(x(), TIME, CLASSES).sample
    assert expected.std() > 0.3
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)
    # Row 5 is no class, and so is diffusers' 1000.
    null = theirs(x(), TIME, torch.full((3,), 1000)).sample
    torch.testing.assert_close(ours(x(), TIME, conditioner.null(3, "cpu")), null, rtol=1e-4, atol=1e-4)
    assert (null[:2] - expected[:2]).abs().max() > 0.01


@torch.no_grad()
def test_blocks_start_as_the_identity_and_the_output_at_zero():
    """Section 3.2, adaLN-Zero, and section 4: the last linear layer is 0."""
    model = dit(vector_width=16, context_width=24)
    tokens, given, context = torch.randn(3, 16, 32), torch.randn(3, 32), torch.randn(3, 5, 24)
    for block in model.blocks:
        assert torch.equal(block(tokens, given, context, None), tokens)
    condition = {"vector": torch.randn(3, 16), "context": context}
    assert torch.equal(model(x(), TIME, condition), torch.zeros(3, 3, 8, 8))
    assert sum(not parameter.any() for parameter in model.embed.parameters()) == 1, "its bias alone"


def test_every_weight_gets_a_gradient():
    """Weights behind a wrong zero would never learn (and data parallelism refuses unused ones)."""
    model = dit(vector_width=16, context_width=24)
    randomise(model)
    model(x(), TIME, {"vector": torch.randn(3, 16), "context": torch.randn(3, 5, 24)}).square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # A shift of all keys by one vector changes no attention.
    assert all(name.endswith("key.bias") for name in without)


def test_what_starts_at_zero_learns():
    model = dit()
    optim = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):  # the output layer learns first, and lets the rest through
        optim.zero_grad()
        (model(x(), TIME, {}) - x()).square().mean().backward()
        optim.step()
    weights = dict(model.named_parameters())
    assert all(weights[f"{layer}.modulation.weight"].any() for layer in ("blocks.0", "blocks.1", "blocks.2", "final"))
    assert model.final.linear.weight.any()


@torch.no_grad()
def test_masked_tokens_of_a_context_are_not_seen():
    model = dit(context_width=24)
    randomise(model)
    context, mask = torch.randn(3, 5, 24), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    other = torch.where(mask[..., None], context, context + 1)
    seen = model(x(), TIME, {"context": context, "mask": mask})
    torch.testing.assert_close(model(x(), TIME, {"context": other, "mask": mask}), seen)
    changed = (model(x(), TIME, {"context": other}) - model(x(), TIME, {"context": context})).abs().amax((1, 2, 3))
    assert changed[0] > 1e-3 and changed[1] == 0


def test_patches_are_undone():
    picture = x(6, 8)
    tokens = patches(picture, 2)
    assert tokens.shape == (3, 12, 12)
    assert torch.equal(pixels(tokens, 3, 4, 2), picture)
    # The second patch lies to the right of the first one: row 0, columns 2 and 3.
    assert torch.equal(tokens[0, 1, :3], picture[0, :, 0, 2])
    assert torch.equal(tokens[0, 1, 3:6], picture[0, :, 0, 3])
    assert torch.equal(tokens[0, 4, :3], picture[0, :, 2, 0])


def test_positions_tell_rows_from_columns_on_any_grid():
    tall = position_embedding(4, 2, 16, "cpu").view(4, 2, 16)
    assert torch.equal(tall[0, 1, 8:], tall[0, 0, 8:]) and not torch.equal(tall[0, 1, :8], tall[0, 0, :8])
    assert torch.equal(tall[1, 0, :8], tall[0, 0, :8]) and not torch.equal(tall[1, 0, 8:], tall[0, 0, 8:])
    assert torch.equal(position_embedding(8, 8, 16, "cpu").view(8, 8, 16)[:4, :2], tall)
    assert len(torch.unique(position_embedding(8, 8, 16, "cpu"), dim=0)) == 64


@torch.no_grad()
def test_neighbouring_times_differ_in_bfloat16():
    model = dit()
    randomise(model)
    model = model.bfloat16()
    answer = model(x()[:1].expand(2, -1, -1, -1), torch.tensor([998, 999]), {})
    assert answer.dtype == torch.bfloat16
    assert not torch.equal(answer[0], answer[1])


def test_attention_is_that_of_torch():
    layer = nn.MultiheadAttention(32, 4, bias=False, batch_first=True)
    tokens = torch.randn(2, 6, 32)
    query, key, value = (tokens @ weight.T for weight in layer.in_proj_weight.chunk(3))
    ours = attend(query, key, value, 4) @ layer.out_proj.weight.T
    torch.testing.assert_close(ours, layer(tokens, tokens, tokens)[0])


def test_mistakes_are_one_sentence():
    with pytest.raises(ConfigError, match=r"width=30 must be a multiple of 4 and of heads=4\.$"):
        dit(width=30)
    with pytest.raises(ConfigError, match=r"patch=2 does not divide latents of 7 x 8\.$"):
        dit()(x(7, 8), TIME, {})
    with pytest.raises(ConfigError, match="up to 1000"):
        transformer(dit(vector_width=32), ClassCondition(ClassConditionConfig(classes=1001, width=32)), 8)
