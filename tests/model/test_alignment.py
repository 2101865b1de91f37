"""Alignment compares a denoiser's hidden tokens with a vision encoder's patches, place by place."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from mmlab.config.errors import ConfigError
from mmlab.model.alignment import Alignment, features_of, on_grid
from mmlab.model.conditioner import NoCondition
from mmlab.model.config import AlignmentConfig, DiTConfig, UNetConfig
from mmlab.model.denoiser import DiffusionModel, UNet
from mmlab.model.dit import DiT
from mmlab.model.first_stage import Identity
from tests.model import tiny


def dit(depth: int = 4) -> DiT:
    torch.manual_seed(0)
    denoiser = DiT(DiTConfig(depth=depth, width=16, heads=2, patch=2), channels=3)
    for weight in denoiser.parameters():  # new blocks are the identity
        nn.init.normal_(weight, std=0.1)
    return denoiser


def unet() -> UNet:
    torch.manual_seed(0)
    fields = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    return UNet(UNetConfig(architecture=fields), channels=3)


def alignment(denoiser: Any, vision: Any = None, **options: Any) -> Alignment:
    return Alignment(AlignmentConfig(width=12, **options), denoiser, vision or tiny.vision())


@torch.no_grad()
def literal(made: Alignment, hidden: torch.Tensor, features: torch.Tensor) -> list[float]:
    """The mean over tokens of x·y / (|x| |y|), token by token."""
    first, second, third = (made.projector[i] for i in (0, 2, 4))
    means = []
    for tokens, patches in zip(hidden, features, strict=True):
        total = 0.0
        for token, y in zip(tokens, patches, strict=True):
            x = third(nn.functional.silu(second(nn.functional.silu(first(token)))))
            total += float(x @ y / ((x @ x).sqrt() * (y @ y).sqrt()))
        means.append(total / len(tokens))
    return means


def test_the_similarity_is_that_of_each_token_and_its_patch():
    made = alignment(dit())
    hidden, features = torch.randn(3, 4, 16), torch.randn(3, 4, 32)
    similarity = made(hidden, features, (2, 2))
    assert similarity.shape == (3,) and similarity.tolist() == pytest.approx(literal(made, hidden, features), abs=1e-6)
    as_map = hidden.transpose(1, 2).unflatten(2, (2, 2))
    torch.testing.assert_close(made(as_map, features, (2, 2)), similarity)
    with torch.no_grad():
        for value in made.projector[-1].parameters():
            value *= 1000
    half = made.half()(hidden.half(), (1000 * features).half(), (2, 2))  # the squares of both overflow
    torch.testing.assert_close(half, similarity, rtol=0, atol=5e-3)


def triangle(side: int, count: int) -> torch.Tensor:
    """Weights of `side` places for each of `count` ones, `[count, side]`: a triangle as wide as the larger step."""
    step = side / count
    reach = max(1.0, step)
    centers = (torch.arange(count) + 0.5) * step
    weights = (1 - (torch.arange(side) + 0.5 - centers[:, None]).abs() / reach).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize(("side", "grid"), [(4, (8, 8)), (8, (4, 4)), (6, (4, 9)), (3, (3, 3))])
def test_features_are_interpolated_to_the_hidden_grid(side, grid):
    features = torch.randn(2, side * side, 5)
    maps = features.unflatten(1, (side, side))
    rows, columns = triangle(side, grid[0]), triangle(side, grid[1])
    expected = torch.einsum("hr,wc,brcd->bhwd", rows, columns, maps).flatten(1, 2)
    torch.testing.assert_close(on_grid(features, grid), expected)


def backward(denoiser: Any, depth: int | None) -> set[str]:
    """Names of the denoiser's weights that the similarity alone has gradients of."""
    made = alignment(denoiser, depth=depth)
    with made.hidden_of(denoiser) as hidden:
        denoiser(torch.randn(2, 3, 4, 4), torch.tensor([1, 500]), {})
    side = 4 // denoiser.reduction
    made(hidden[0], torch.randn(2, 4, 32), (side, side)).sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in made.parameters())
    assert len(hidden) == 1 and not any(layer._forward_hooks for layer in denoiser.modules())
    return {name for name, weight in denoiser.named_parameters() if weight.grad is not None and weight.grad.any()}


@pytest.mark.parametrize(("depth", "reached"), [(1, 1), (3, 3), (None, 2), (4, 4)])
def test_gradients_reach_the_chosen_block_and_none_behind_it(depth, reached):
    names = backward(dit(), depth)
    assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == set("0123"[:reached])
    assert "embed.weight" in names and not any(name.startswith("final") for name in names)


def test_the_default_depth_is_eight_of_twenty_eight():
    for count, chosen in ((28, 8), (12, 4), (4, 2), (1, 1)):
        denoiser = dit(count)
        assert denoiser.aligned_layer(None)[0] is denoiser.blocks[chosen - 1]


def test_gradients_reach_the_middle_of_a_unet_and_nothing_behind_it():
    names = backward(unet(), None)
    parts = {name.split(".")[1] for name in names}
    assert parts == {"time_embedding", "conv_in", "down_blocks", "mid_block"}


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_registers", "clip", "siglip"])
def test_features_are_those_of_the_patches_behind_the_last_norm(kind):
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    last, inner = tiny.vision(kind, feature_layer=-1).eval(), tiny.vision(kind, feature_layer=-2).eval()
    with torch.no_grad():
        hidden = last.tower(last.normalize(pixels)).last_hidden_state
        assert features_of(last, pixels).equal(hidden[:, last.prefix :])
        assert features_of(last, pixels).equal(last(pixels)) is (kind == "clip"), "CLIP's norm is that of its class"
        assert features_of(inner, pixels).equal(inner(pixels))
    if last.prefix:
        with_class = tiny.vision(kind, features="cls_patch").eval()
        assert features_of(with_class, pixels).equal(with_class(pixels)[:, 1:])


def test_pictures_of_any_size_are_resized_for_the_encoder():
    vision = tiny.vision().eval()
    wide = torch.randint(0, 256, (2, 3, 24, 16), dtype=torch.uint8)
    assert features_of(vision, wide).shape == (2, 4, 32) and not features_of(vision, wide).requires_grad
    one = features_of(vision, wide[1:])
    torch.testing.assert_close(features_of(vision, wide)[1:], one)


class Odd(nn.Module):
    image_size, tokens_per_image, width = 16, 7, 8


class Pooled(nn.Module):
    image_size, tokens_per_image, width = 16, 1, 8


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: alignment(dit(), depth=5), r"model.alignment.depth=5, but the denoiser has 4 blocks"),
        (lambda: alignment(unet(), depth=1), "a UNet is aligned at its middle block"),
        (lambda: alignment(dit(), Odd()), "model.vision gives 7 features of an image"),
        (lambda: alignment(dit(), Pooled()), "model.vision gives 1 feature.* choose another encoder"),
        (lambda: alignment(dit(), nn.Linear(1, 1)), "Linear is not a vision encoder"),
        (lambda: alignment(nn.Linear(1, 1)), "takes hidden tokens of a UNet or a DiT; .* in Linear"),
        (lambda: Alignment(AlignmentConfig(), dit(), None), "needs the vision encoder .* choose model/vision="),
        (lambda: AlignmentConfig(depth=0), "'depth' must be above 0"),
        (
            lambda: DiffusionModel(Identity(), NoCondition(), partial(DiT, DiTConfig()), vision=tiny.vision()),
            "of no use without an alignment; choose model/alignment=repa",
        ),
    ],
)
def test_what_cannot_be_aligned_is_refused(make, says):
    with pytest.raises(ConfigError, match=says) as error:
        make()
    assert "\n" not in str(error.value)
