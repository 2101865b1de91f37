import pytest
import torch
from transformers import AutoModel, Blip2VisionModel, CLIPConfig, CLIPModel

from mmlab.config.errors import ConfigError
from mmlab.model.config import VisionEncoderConfig
from mmlab.model.vision import VisionEncoder
from tests.model import tiny

PIXELS = torch.arange(3 * 16 * 16, dtype=torch.uint8).reshape(1, 3, 16, 16)


@pytest.mark.parametrize("kind", tiny.VISION)
@pytest.mark.parametrize("layer", [-2, -1, 2])
def test_features_equal_the_towers_hidden_state(kind, layer):
    torch.manual_seed(0)
    encoder = tiny.vision(kind, feature_layer=layer).eval()
    ours = encoder(PIXELS)
    with encoder._whole_tower():
        captured = []
        layers = encoder._layers
        layer_module = layers[(layer % (len(layers) + 1)) - 1]
        handle = layer_module.register_forward_hook(
            lambda m, a, out: captured.append(out[0] if isinstance(out, tuple) else out)
        )
        encoder.tower(pixel_values=(PIXELS - encoder.mean) / encoder.std)
        handle.remove()
    assert ours.shape == (1, encoder.tokens_per_image, encoder.width)
    assert torch.allclose(ours, captured[0][:, encoder.prefix :], atol=1e-6)


def test_clip_features_equal_transformers_hidden_states():
    encoder = tiny.vision("clip", features="cls_patch").eval()
    with encoder._whole_tower():
        out = encoder.tower(pixel_values=(PIXELS - encoder.mean) / encoder.std, output_hidden_states=True)
    assert torch.allclose(encoder(PIXELS), out.hidden_states[-2], atol=1e-6)


def test_unused_layers_are_not_run():
    encoder = tiny.vision("clip", feature_layer=-2)
    ran = []
    for layer in encoder.unused_layers:
        layer.register_forward_hook(lambda *_: ran.append(1))
    encoder(PIXELS)
    assert len(encoder.unused_layers) == 1 and not ran


@pytest.mark.parametrize("kind", [*tiny.VISION, "siglip with its head"])
@pytest.mark.parametrize("layer", [-2, -1])
def test_unused_weights_are_those_without_a_gradient(monkeypatch, kind, layer):
    monkeypatch.setitem(tiny.VISION, "siglip with its head", {**tiny.VISION["siglip"], "vision_use_head": True})
    encoder = tiny.vision(kind, feature_layer=layer)
    encoder(PIXELS).square().sum().backward()
    names = {weight: name for name, weight in encoder.named_parameters()}
    unused = sorted(names[weight] for weight in encoder.unused())
    assert unused == sorted(name for weight, name in names.items() if weight.grad is None)
    assert any("norm" in name for name in unused)


@pytest.mark.parametrize("kind", tiny.VISION)
def test_saved_folder_is_the_whole_tower(kind, tmp_path):
    torch.manual_seed(1)
    encoder = tiny.vision(kind).eval()
    encoder.save(tmp_path)
    again = tiny.pretrained(VisionEncoder(VisionEncoderConfig(source=str(tmp_path))))
    assert torch.equal(again(PIXELS), encoder(PIXELS))
    tower = (Blip2VisionModel if kind == "blip2" else AutoModel).from_pretrained(tmp_path)
    assert sum(p.numel() for p in tower.parameters()) == sum(p.numel() for p in encoder.parameters())


def test_loads_the_vision_half_of_a_clip_checkpoint(tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**small, "image_size": 16, "patch_size": 8},
    )
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path)
    encoder = tiny.pretrained(VisionEncoder(VisionEncoderConfig(source=str(tmp_path), feature_layer=-1)))
    out = clip.vision_model(pixel_values=(PIXELS - encoder.mean) / encoder.std, output_hidden_states=True)
    assert torch.allclose(encoder(PIXELS), out.hidden_states[-1][:, 1:], atol=1e-6)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"feature_layer": 9}, "the tower has 3 layers"),
        ({"feature_layer": 0}, "no transformer layer"),
        ({"features": "cls_patch"}, "not available for siglip"),
    ],
)
def test_wrong_features_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        tiny.vision("siglip", **options)


def test_wrong_architectures_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'clip_vision_model'"):
        VisionEncoder(VisionEncoderConfig(init="random", architecture={"model_type": "clip_vision_modle"}))
    with pytest.raises(ConfigError, match="Did you mean 'hidden_size'"):
        VisionEncoder(
            VisionEncoderConfig(init="random", architecture={"model_type": "clip_vision_model", "hiden_size": 8})
        )
    with pytest.raises(ConfigError, match="'bert' cannot be used, because it reads no images"):
        VisionEncoder(VisionEncoderConfig(init="random", architecture={"model_type": "bert"}))
    (tmp_path / "config.json").write_text('{"model_type": "clip", "auto_map": {"AutoModel": "evil.Evil"}}')
    with pytest.raises(ConfigError, match="auto_map"):
        VisionEncoder(VisionEncoderConfig(source=str(tmp_path)))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        VisionEncoder(VisionEncoderConfig(source=str(tmp_path / "nowhere")))
