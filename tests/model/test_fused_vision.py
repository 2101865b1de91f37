"""Two encoders side by side: their features, their folders, and what they need to fit."""

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from mmlab.config.build import build
from mmlab.config.compose import compose
from mmlab.config.errors import ConfigError
from mmlab.model.connector import FusedMLPConnector
from mmlab.model.fused_vision import FusedVisionEncoder
from mmlab.model.preprocessing import resized
from mmlab.training.artifacts import save_parts
from mmlab.training.filling import fill_parts, random_parts
from mmlab.training.trainable import set_trainable
from tests.model import tiny


class Plain(nn.Module):
    """A user's own encoder without a format of its own."""

    image_size, width, tokens_per_image = 16, 6, 4

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 8, 8)

    def forward(self, pixels):
        return self.conv(pixels / 255).flatten(2).transpose(1, 2)


def fused(size: int = 16) -> FusedVisionEncoder:
    first = tiny.vision("dinov2_registers", image_mean=[0.4] * 3, image_size=size)
    return FusedVisionEncoder(first, tiny.vision("siglip", image_std=[0.2] * 3)).eval()


def test_features_are_concatenated_at_each_position():
    torch.manual_seed(0)
    encoder = fused()
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    features = encoder(pixels)
    assert (encoder.image_size, encoder.tokens_per_image, encoder.width) == (16, 4, 64)
    assert torch.equal(features, torch.cat([encoder.first(pixels), encoder.second(pixels)], -1))
    assert not torch.equal(encoder.first.mean, encoder.second.mean)


def test_the_page_of_two_small_encoders():
    encoder = build(compose("train", ["experiment=llava/align_tiny", "model/vision=fused"]).model.vision)
    pixels = torch.zeros(1, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8)
    assert encoder(pixels).shape == (1, encoder.tokens_per_image, encoder.width) == (1, 64, 256)
    assert "Dinov2" in type(encoder.first.tower).__name__ and "Siglip" in type(encoder.second.tower).__name__


def test_each_encoder_has_its_size():
    encoder = fused(20)  # as many patches of 8 px as 16 px have
    pixels = torch.randint(0, 256, (1, 3, 20, 20), dtype=torch.uint8)
    assert encoder.image_size == 20
    assert torch.equal(encoder(pixels)[..., 32:], encoder.second(resized(pixels, 16)))
    with pytest.raises(
        ConfigError, match=r"vision.first gives 9 tokens for 24 px, and model.vision.second 4 for 16 px; set the image_"
    ):
        fused(24)
    with pytest.raises(ConfigError, match="Linear is not a vision encoder"):
        FusedVisionEncoder(tiny.vision("clip"), nn.Linear(1, 1))


@pytest.mark.parametrize("second", [Plain, lambda: tiny.vision("siglip")])
def test_both_are_one_part(second, tmp_path):
    torch.manual_seed(0)

    def model() -> nn.ModuleDict:
        return nn.ModuleDict({"vision": FusedVisionEncoder(tiny.vision("clip"), second()), "head": nn.Linear(1, 1)})

    before, after = model(), model()
    assert set_trainable(before, ["vision"]) == ["head"]
    assert not any(weight.requires_grad for weight in before["vision"].first.unused())  # type: ignore[union-attr]
    save_parts(before, ["vision"], tmp_path / "artifacts", {}, {})
    fill_parts(after, [tmp_path])
    state = before["vision"].state_dict()
    assert all(torch.equal(value, state[name]) for name, value in after["vision"].state_dict().items())
    description = after["vision"].describe()  # type: ignore[operator]
    assert description["first.feature_layer"] == -2 and ("second.class_token" in description) == (second is not Plain)
    save_parts(nn.ModuleDict({"vision": tiny.vision("clip")}), ["vision"], tmp_path / "one" / "artifacts", {}, {})
    with pytest.raises(ConfigError, match="it has no first/, so it is not of two encoders"):
        fill_parts(after, [tmp_path / "one"])


def test_an_encoder_with_random_weights_beside_a_pretrained_one_is_kept(tmp_path):
    tiny.vision("clip").save(tmp_path)
    settings = type(tiny.vision("clip").settings)(source=str(tmp_path))
    pretrained = [type(tiny.vision("clip"))(settings) for _ in range(3)]
    half = nn.ModuleDict({"vision": FusedVisionEncoder(pretrained[0], tiny.vision("siglip")), "head": nn.Linear(1, 1)})
    whole = nn.ModuleDict({"vision": FusedVisionEncoder(*pretrained[1:]), "head": nn.Linear(1, 1)})
    for model, kept in ((half, ["vision"]), (whole, [])):
        set_trainable(model, ["head"])
        assert random_parts(model, fill_parts(model, [])) == kept


def test_the_connector_is_prismatics():
    connector = FusedMLPConnector(6, 5)
    features = torch.randn(2, 3, 6)
    assert [list(weight.shape) for weight in connector.parameters() if weight.dim() == 2] == [[24, 6], [5, 24], [5, 5]]
    first, _, second, _, third = connector.layers
    assert torch.equal(connector(features), third(gelu(second(gelu(first(features))))))
