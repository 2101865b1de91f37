from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.model import perceptual
from mmlab.model.config import LPIPSConfig
from mmlab.model.perceptual import FILE, LPIPS, STAGES, StandIn
from tests.model import tiny_autoencoders as tiny

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
READ_AFTER = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of torchvision's vgg16().features


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """VGG16 with a sixteenth of its channels."""
    monkeypatch.setattr(perceptual, "STAGES", tuple(tuple(c // 16 for c in stage) for stage in STAGES))


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    found, below = {}, 3
    channels = [c for stage in perceptual.STAGES for c in stage]
    for i, width in zip(CONVOLUTIONS, channels, strict=True):
        found[f"features.{i}.weight"] = torch.randn(width, below, 3, 3) * (2 / (9 * below)) ** 0.5
        found[f"features.{i}.bias"] = torch.randn(width) * 0.1
        below = width
    for k, stage in enumerate(perceptual.STAGES):
        found[f"lin{k}.weight"] = torch.rand(1, stage[-1], 1, 1)
    return found


def lpips_names(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the lpips package's state_dict has them, `lins` apart."""
    found = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    for name, tensor in stored.items():
        if name.startswith("lin"):
            found[name.replace(".weight", ".model.1.weight")] = tensor
        else:
            _, i, kind = name.split(".")
            piece = 1 + next(n for n, stop in enumerate(READ_AFTER) if int(i) <= stop)
            found[f"net.slice{piece}.{i}.{kind}"] = tensor
    return found


def slowly(stored: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Equation 1 of the paper, layer by layer and place by place."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)

    def features(pixels: Tensor) -> list[Tensor]:
        hidden, read = (pixels - shift) / scale, []
        for i in range(30):
            if i in CONVOLUTIONS:
                hidden = F.conv2d(hidden, stored[f"features.{i}.weight"], stored[f"features.{i}.bias"], padding=1)
            elif i in (4, 9, 16, 23):
                hidden = F.max_pool2d(hidden, 2)
            else:
                hidden = hidden.relu()
            if i in READ_AFTER:
                read.append(hidden / (hidden.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return read

    total = torch.zeros(len(x))
    for k, (a, b) in enumerate(zip(features(x), features(y), strict=True)):
        total += F.conv2d((a - b).square(), stored[f"lin{k}.weight"])[:, 0].mean((1, 2))
    return total


def lpips(source: Path | str | None) -> LPIPS:
    distance = LPIPS(LPIPSConfig(source=None if source is None else str(source)))
    distance.load_pretrained()
    return distance


@pytest.mark.parametrize("naming", ["ours", "lpips"])
def test_lpips_is_the_paper_s_equation(tmp_path, naming):
    stored = weights()
    save_file(stored if naming == "ours" else lpips_names(stored), tmp_path / FILE)
    x, y = tiny.pictures(2, 32), tiny.pictures(2, 32, seed=1)
    for source in (tmp_path, tmp_path / FILE):
        model = lpips(source)
        torch.testing.assert_close(model(x, y), slowly(stored, x, y))
        assert torch.equal(model(x, x), torch.zeros(2))
        assert "LPIPS" in model.label
    assert [type(layer) for layer in model.features[:5]] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.MaxPool2d]


def test_absent_or_other_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="model/perceptual=stand_in needs none"):
        lpips(None)
    with pytest.raises(ConfigError, match=r"source=nobody/nothing is neither a file nor a repository"):
        lpips("nobody/nothing")
    (tmp_path / "junk.safetensors").write_text("junk")
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        lpips(tmp_path / "junk.safetensors")
    stored = weights()
    del stored["lin3.weight"]
    save_file(stored, tmp_path / FILE)
    with pytest.raises(ConfigError, match=r"lin3\.weight is nothing there"):
        lpips(tmp_path)


def test_it_is_counted_without_its_weights(monkeypatch):
    monkeypatch.setattr(perceptual, "STAGES", STAGES)
    with torch.device("meta"):
        count = sum(p.numel() for p in LPIPS(LPIPSConfig()).parameters())
    assert count == 14_714_688 + 1472  # VGG16's convolutions and the heads


def test_the_stand_in_is_a_distance_and_says_what_it_is():
    distance, x, y = StandIn(), tiny.pictures(3, 32), tiny.pictures(3, 32, seed=1)
    assert "not LPIPS" in distance.label
    assert torch.equal(distance(x, x), torch.zeros(3))
    torch.testing.assert_close(distance(x, y), distance(y, x))
    assert (distance(x, y) > 0.2).all() and (distance(x, y) < 2).all()
    assert not list(distance.parameters()) and not distance.state_dict()
    torch.manual_seed(1)
    assert torch.equal(StandIn()(x, y), distance(x, y)), "it is always the same"
    assert distance(x[:, :, :8, :8], y[:, :, :8, :8]).shape == (3,)


def test_the_stand_in_sees_a_lost_edge_more_than_a_shifted_brightness():
    x = -torch.ones(1, 3, 32, 32)
    x[..., 8:24, 8:24] = 1
    blurred = F.avg_pool2d(x, 5, stride=1, padding=2, count_include_pad=False)
    brighter = x * 0.8
    error = (blurred - x).square().mean().sqrt()
    brighter = x + 2 * error  # four times the squared error of the blur
    distance = StandIn()
    assert distance(blurred, x) > 10 * distance(brighter, x)


def test_a_gradient_step_on_the_stand_in_brings_pictures_closer():
    distance, x = StandIn(), tiny.pictures(2, 16)
    y = torch.zeros_like(x, requires_grad=True)
    before = distance(y, x)
    (gradient,) = torch.autograd.grad(before.sum(), y)
    assert gradient.isfinite().all()
    with torch.no_grad():
        assert (distance(y - 0.05 * gradient.sign(), x) < before).all()


@pytest.mark.parametrize("make", [LPIPS, StandIn])
def test_weights_of_bf16_take_float32_pictures(tmp_path, make):
    save_file(weights(), tmp_path / FILE)
    distance = lpips(tmp_path) if make is LPIPS else make()
    x, y = tiny.pictures(2, 32), tiny.pictures(2, 32, seed=1)
    expected = distance(x, y)
    found = distance.to(torch.bfloat16)(x, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


def test_the_smallest_picture_is_the_smallest(tmp_path):
    save_file(weights(), tmp_path / FILE)
    distance = lpips(tmp_path)
    assert distance(*(tiny.pictures(1, distance.smallest, seed=n) for n in range(2))).isfinite().all()
    with pytest.raises(RuntimeError):
        distance(*(tiny.pictures(1, distance.smallest - 1, seed=n) for n in range(2)))
