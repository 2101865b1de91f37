import pytest
import torch
from torch import nn

from mmlab.model.config import PatchDiscriminatorConfig
from mmlab.model.discriminator import PatchDiscriminator


def test_it_has_the_published_weights_and_sees_patches_of_70_pixels():
    model = PatchDiscriminator(PatchDiscriminatorConfig()).eval()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(2.77e6, rel=0.002)
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = model(x)
    assert logits.shape == (1, 1, 14, 14)
    (seen,) = torch.autograd.grad(logits[0, 0, 7, 7], x)
    rows = seen[0].abs().sum((0, 2)).nonzero().flatten()
    assert (len(rows), rows.max() - rows.min() + 1) == (70, 70)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_picture_is_the_smallest(layers):
    model = PatchDiscriminator(PatchDiscriminatorConfig(layers=layers, width=8)).eval()
    side = model.smallest
    assert model(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 3, side - 1, side - 1))


def test_layers_and_norms_are_pix2pix_s():
    model = PatchDiscriminator(PatchDiscriminatorConfig(layers=4, width=8))
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [8, 16, 32, 64, 64, 1]
    assert [c.stride[0] for c in convolutions] == [2, 2, 2, 2, 1, 1]
    assert [c.bias is not None for c in convolutions] == [True, False, False, False, False, True]
    assert len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]) == 4
    torch.manual_seed(0)
    weights = PatchDiscriminator(PatchDiscriminatorConfig()).blocks[2].get_parameter("weight").detach()
    assert weights.std() == pytest.approx(0.02, rel=0.02) and abs(weights.mean()) < 1e-3


def test_weights_of_bf16_take_float32_pictures():
    model = PatchDiscriminator(PatchDiscriminatorConfig(layers=1, width=8)).eval()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = model(x)
    torch.testing.assert_close(model.to(torch.bfloat16)(x).float(), expected, rtol=0.05, atol=0.01)
