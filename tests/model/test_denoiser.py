"""The UNets are diffusers', with the widths that first stage and conditioner give."""

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from mmlab.config.errors import ConfigError
from mmlab.export.diffusers_modules import unet
from mmlab.model.conditioner import ClassCondition, NoCondition
from mmlab.model.config import ClassConditionConfig, UNetConfig
from mmlab.model.denoiser import DiffusionModel, UNet
from mmlab.model.first_stage import Identity

SMALL = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
CONFIG = UNetConfig(architecture=SMALL)
TIME = torch.tensor([0, 999])


def x(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_without_a_context_it_is_unet2d():
    denoiser = UNet(CONFIG, 5).eval()
    assert type(denoiser.unet) is UNet2DModel
    answer = denoiser(x(5), TIME, {})
    assert torch.equal(answer, denoiser.unet(x(5), TIME).sample) and answer.shape == (2, 5, 8, 8)


def test_block_types_follow_from_the_widths_unless_given():
    plain, cross = (UNet(CONFIG, 3).unet.config, UNet(CONFIG, 3, context_width=4).unet.config)
    assert list(plain.down_block_types) == ["DownBlock2D", "AttnDownBlock2D"]
    assert list(plain.up_block_types) == ["AttnUpBlock2D", "UpBlock2D"]
    assert list(cross.down_block_types) == ["DownBlock2D", "CrossAttnDownBlock2D"]
    assert list(cross.up_block_types) == ["CrossAttnUpBlock2D", "UpBlock2D"]
    given = {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}
    assert (
        list(UNet(UNetConfig(architecture={**SMALL, **given}), 3).unet.config.down_block_types)
        == given["down_block_types"]
    )


@torch.no_grad()
def test_with_a_context_it_is_unet2d_condition():
    denoiser = UNet(CONFIG, 4, context_width=12).eval()
    assert type(denoiser.unet) is UNet2DConditionModel and denoiser.unet.config["cross_attention_dim"] == 12
    context, mask = torch.randn(2, 5, 12), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    seen = denoiser(x(4), TIME, {"context": context, "mask": mask})
    assert torch.equal(seen, denoiser.unet(x(4), TIME, context, encoder_attention_mask=mask).sample)
    other = torch.where(mask[..., None], context, context + 1)
    torch.testing.assert_close(denoiser(x(4), TIME, {"context": other, "mask": mask}), seen)
    assert (denoiser(x(4), TIME, {"context": other}) - seen).abs().max() > 1e-4
    assert (denoiser(x(4), TIME, {"context": context + 1, "mask": mask}) - seen).abs().max() > 1e-4


@pytest.mark.parametrize("width", [32, 20])
@torch.no_grad()
def test_a_vector_is_added_to_the_time(width):
    """32 is the time's own width, where no layer stands between; the exported UNet has a table of classes instead."""
    torch.manual_seed(0)
    conditioner = ClassCondition(ClassConditionConfig(classes=5, width=width))
    torch.nn.init.normal_(conditioner.embedding.weight)
    denoiser = UNet(CONFIG, 3, vector_width=width).eval()
    assert isinstance(denoiser.vector, torch.nn.Identity) == (width == 32)
    exported = unet(denoiser, conditioner, 8)
    labels = torch.tensor([1, 4])
    answer = denoiser(x(), TIME, conditioner({"labels": labels}))
    torch.testing.assert_close(answer, exported(x(), TIME, labels).sample, rtol=1e-5, atol=1e-5)
    null = denoiser(x(), TIME, conditioner.null(2, "cpu"))
    torch.testing.assert_close(null, exported(x(), TIME, torch.tensor([5, 5])).sample, rtol=1e-5, atol=1e-5)
    assert (null - answer).abs().amax((1, 2, 3)).min() > 1e-4
    assert exported.config.sample_size == 8


def test_vector_and_context_together():
    denoiser = UNet(CONFIG, 3, vector_width=20, context_width=12)
    vector, context = torch.randn(2, 20, requires_grad=True), torch.randn(2, 1, 12, requires_grad=True)
    denoiser(x(), TIME, {"vector": vector, "context": context}).square().sum().backward()
    assert vector.grad is not None and vector.grad.abs().min(1).values.max() > 0
    assert context.grad is not None and context.grad.abs().max() > 0
    assert [name for name, p in denoiser.named_parameters() if p.grad is None] == []


def test_the_model_gives_the_widths():
    seen = {}

    def denoiser(**widths):
        seen.update(widths)
        return torch.nn.Identity()

    model = DiffusionModel(
        Identity(), ClassCondition(ClassConditionConfig(classes=3, width=6, as_context=True)), denoiser
    )
    assert seen == {"channels": 3, "vector_width": None, "context_width": 6}
    assert [name for name, _ in model.named_children()] == ["first_stage", "conditioner", "denoiser"]
    DiffusionModel(Identity(), NoCondition(), denoiser)
    assert seen == {"channels": 3, "vector_width": None, "context_width": None}


def test_float_times_are_taken():
    denoiser = UNet(CONFIG, 3)
    torch.testing.assert_close(denoiser(x(), TIME.float(), {}), denoiser(x(), TIME, {}))


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ({"block_out_channels": 64}, "block_out_channels=64 must be a list"),
        ({"block_out_chanels": [8]}, "no field 'block_out_chanels' for UNet2DModel. Did you mean 'block_out_channels'"),
        ({"in_channels": 4}, "in_channels follows from the first stage and the conditioner; leave it out"),
        ({"up_block_types": ["UpBlock2D"]}, "does not build a UNet2DModel: Must provide the same number"),
        ({"down_block_types": ["DownBlock2D", "AttnDown"]}, "does not build a UNet2DModel: AttnDown does not exist"),
    ],
)
def test_a_wrong_architecture_is_one_sentence(architecture, says):
    with pytest.raises(ConfigError, match=says):
        UNet(UNetConfig(architecture={**SMALL, **architecture}), 3)


def test_sides_that_do_not_divide():
    with pytest.raises(ConfigError, match=r"halves its input 1 times: 7 x 8 must divide by 2"):
        UNet(CONFIG, 3)(torch.randn(2, 3, 7, 8), TIME, {})
