import json

import pytest
import torch
from transformers import AutoModel, Blip2VisionModel, CLIPConfig, CLIPModel, ResNetConfig, ResNetModel

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
    with encoder.whole_tower():
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
    with encoder.whole_tower():
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
    with pytest.raises(ConfigError, match="'bert' cannot be used, because it takes other inputs than the pixels"):
        VisionEncoder(VisionEncoderConfig(init="random", architecture={"model_type": "bert"}))
    with pytest.raises(ConfigError, match="'siglip_vision_model' cannot be built, because embed_dim must be divisible"):
        VisionEncoder(
            VisionEncoderConfig(
                init="random", architecture={"model_type": "siglip_vision_model", "num_attention_heads": 7}
            )
        )
    (tmp_path / "config.json").write_text('{"model_type": "clip", "auto_map": {"AutoModel": "evil.Evil"}}')
    with pytest.raises(ConfigError, match="auto_map"):
        VisionEncoder(VisionEncoderConfig(source=str(tmp_path)))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        VisionEncoder(VisionEncoderConfig(source=str(tmp_path / "nowhere")))


def checkpoint(folder, kind: str = "siglip", **preprocessor) -> str:
    """A tower's folder with a `preprocessor_config.json`."""
    tiny.vision(kind).save(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return str(folder)


def test_statistics_are_those_of_the_source(tmp_path):
    source = checkpoint(tmp_path / "a", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    encoder = VisionEncoder(VisionEncoderConfig(source=source))
    assert (encoder.image_mean, encoder.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert torch.equal(encoder.std.flatten(), torch.tensor([0.4, 0.5, 0.6]) * 255)
    tiny.pretrained(encoder).save(tmp_path / "b")
    again = VisionEncoder(VisionEncoderConfig(source=str(tmp_path / "b")))
    assert again.image_mean == encoder.image_mean, "an artifact keeps the statistics that it was read with"
    explicit = VisionEncoder(VisionEncoderConfig(source=source, image_mean=[0.5, 0.5, 0.5]))
    assert (explicit.image_mean, explicit.image_std) == ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6])
    unscaled = VisionEncoder(VisionEncoderConfig(source=checkpoint(tmp_path / "c", do_normalize=False)))
    assert (unscaled.image_mean, unscaled.image_std) == ([0.0] * 3, [1.0] * 3)
    clip = [0.48145466, 0.4578275, 0.40821073]
    assert tiny.vision("clip").image_mean == clip
    assert VisionEncoder(VisionEncoderConfig(source=checkpoint(tmp_path / "d"))).image_mean == clip
    flipped = checkpoint(tmp_path / "e", do_flip_channel_order=True)
    with pytest.raises(ConfigError, match=r"preprocessor_config.json: do_flip_channel_order=true \(blue first\)"):
        VisionEncoder(VisionEncoderConfig(source=flipped))


def test_pixels_of_another_scale_get_the_statistics_of_transformers(tmp_path):
    from transformers import EfficientNetImageProcessorPil

    efficientnet = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    scales = ({"include_top": True}, {"rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": False})
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for number, scale in enumerate((*scales, {"do_rescale": False, "include_top": False})):
        settings = {**efficientnet, **scale}
        encoder = VisionEncoder(VisionEncoderConfig(source=checkpoint(tmp_path / str(number), **settings)))
        processor = EfficientNetImageProcessorPil(do_resize=False, do_center_crop=False, **settings)
        torch.testing.assert_close(
            encoder.normalize(pixels)[0],
            torch.tensor(processor(pixels[0].numpy(), input_data_format="channels_first")["pixel_values"][0]),
            atol=1e-4,
            rtol=1e-5,
        )


@pytest.mark.parametrize("values", ["a", [0.5, 0.5], [0.5, None, 0.5], [float("nan")] * 3])
def test_statistics_are_three_numbers(tmp_path, values):
    assert VisionEncoder(VisionEncoderConfig(source=checkpoint(tmp_path / "a", image_std=0.5))).image_std == [0.5] * 3
    with pytest.raises(ConfigError, match=r"model\.vision\.image_mean is .*; give three numbers, for red"):
        VisionEncoder(VisionEncoderConfig(source=checkpoint(tmp_path / "b", image_mean=values)))
    with pytest.raises(ConfigError, match=r"image_std is .* give three numbers above 0"):
        VisionEncoder(VisionEncoderConfig(source=checkpoint(tmp_path / "c"), image_std=[0.5, 0, 0.5]))
    (tmp_path / "c" / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json is not a mapping"):
        VisionEncoder(VisionEncoderConfig(source=str(tmp_path / "c")))


def test_a_folder_at_home_is_read_with_its_statistics(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    checkpoint(tmp_path / "clip", image_std=0.3)
    encoder = VisionEncoder(VisionEncoderConfig(source="~/clip"))
    encoder.load_pretrained()
    assert encoder.image_std == [0.3] * 3


def test_a_tower_without_a_size_takes_that_of_its_image_processor(tmp_path):
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])).save_pretrained(tmp_path)
    config = VisionEncoderConfig(source=str(tmp_path))
    assert VisionEncoder(config).image_size == 224
    for sizes, pixels in [
        ({"size": {"shortest_edge": 96}, "crop_size": {"height": 64, "width": 64}}, 64),
        ({"size": {"shortest_edge": 96}}, 96),
        ({"size": 80}, 80),
    ]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(sizes))
        encoder = VisionEncoder(config)
        assert (encoder.image_size, encoder.tokens_per_image) == (pixels, (pixels // 8) ** 2)
    with torch.device("meta"):  # as `mmlab plan` does
        assert VisionEncoder(config).image_size == 80


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "dinov2_registers"])
def test_another_image_size_interpolates_position_embeddings(kind):
    torch.manual_seed(0)
    encoder = tiny.vision(kind, image_size=28, feature_layer=-1).eval()
    assert (encoder.image_size, encoder.tokens_per_image) == (28, 9)
    assert encoder.describe()["image_size"] == 28 and "image_size" not in tiny.vision(kind).describe()
    pixels = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    options = {} if kind.startswith("dino") else {"interpolate_pos_encoding": True}
    whole = encoder.tower(pixel_values=(pixels - encoder.mean) / encoder.std, output_hidden_states=True, **options)
    assert torch.allclose(encoder(pixels), whole.hidden_states[-1][:, encoder.prefix :], atol=1e-6)


def test_a_size_that_a_tower_does_not_take_is_refused():
    with pytest.raises(ConfigError, match=r"'aimv2_vision_model' does not encode an image of 32 px: "):
        fields = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        architecture = {"model_type": "aimv2_vision_model", **fields, "image_size": 16, "patch_size": 8}
        VisionEncoder(VisionEncoderConfig(init="random", architecture=architecture, image_size=32))


def test_stages_have_no_feature_layer():
    architecture = {"model_type": "resnet", "hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8}
    with pytest.raises(ConfigError, match="feature_layer=-2, but resnet has no layers of one width and resolution"):
        VisionEncoder(VisionEncoderConfig(init="random", architecture=architecture, feature_layer=-2))


def test_siglip_2_gets_patches_as_its_processor_cuts_them():
    """Rows of patches; within a patch height, width, channel (`convert_image_to_patches`, which needs torchvision)."""
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    architecture = {"model_type": "siglip2_vision_model", **fields, "num_patches": 16, "patch_size": 8}
    encoder = VisionEncoder(VisionEncoderConfig(init="random", architecture=architecture, image_size=40)).eval()
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    normal = (pixels - encoder.mean) / encoder.std
    corners = [(row, column) for row in range(0, 40, 8) for column in range(0, 40, 8)]
    patches = [normal[:, :, r : r + 8, c : c + 8].permute(0, 2, 3, 1).flatten(1) for r, c in corners]
    shapes, ones = torch.tensor([[5, 5]] * 2), torch.ones(2, 25, dtype=torch.int32)
    with encoder.whole_tower():
        whole = encoder.tower(torch.stack(patches, 1), ones, shapes, output_hidden_states=True)
    assert torch.allclose(encoder(pixels), whole.hidden_states[-2], atol=1e-5)


def test_a_probe_draws_no_random_numbers_and_leaves_the_tower_as_it_was():
    config = tiny.vision("dinov2").config
    torch.manual_seed(0)
    plain, expected = AutoModel.from_config(config), torch.rand(3)
    torch.manual_seed(0)
    encoder, drawn = tiny.vision("dinov2"), torch.rand(3)
    assert torch.equal(drawn, expected) and encoder.tower.training
    with encoder.whole_tower():
        state = encoder.tower.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
