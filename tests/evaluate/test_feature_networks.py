"""The networks of FID and KID: they are described in every result, and refused if they are not installed."""

import json
import pickle
import sys
from types import ModuleType

import pytest
import torch

from mmlab.config.errors import ConfigError
from mmlab.evaluate.pictures import feature_networks
from mmlab.evaluate.pictures.feature_networks import WEIGHTS, feature_network, resized
from mmlab.model.preprocessing import statistics
from tests.evaluate.tiny_scores import contrastive_run, make_run
from tests.model import tiny


def pictures(count: int = 3, side: int = 16) -> torch.Tensor:
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_features_of_a_run_are_its_trained_encoder_s(tmp_path, tokenizer_folder):
    folder = contrastive_run(tmp_path, tokenizer_folder)
    network = feature_network("eye", tmp_path)
    features = network(pictures())
    assert features.shape == (3, 32) and features.dtype == torch.float32 and not features.requires_grad
    about = network.describe()
    card = json.loads((folder / "artifacts" / "vision" / "card.json").read_text())
    assert about["hash"] == card["content_hash"], "the weights that were trained, not random ones"
    assert about["width"] == 32 and about["stand_in"] is True and "run eye" in about["network"]
    assert "16 px, bicubic with antialiasing" in about["input"]
    assert torch.equal(network(pictures()[:1]), features[:1])
    larger = pictures(side=40)
    assert torch.equal(network(larger), network(resized(larger, 16)))


@pytest.mark.parametrize("kind", ["clip", "dinov2", "siglip"])
def test_features_of_a_pretrained_model_are_what_its_head_pools(tmp_path, kind):
    torch.manual_seed(0)
    tower = tiny.vision(kind, feature_layer=-1).tower.eval()
    tower.save_pretrained(tmp_path / "eye")
    preprocessor = {"crop_size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    side = 24 if kind == "dinov2" else 16  # it interpolates its positions, as the preprocessor of its checkpoints asks
    if kind == "dinov2":
        (tmp_path / "eye" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    network = feature_network(str(tmp_path / "eye"))
    pixels = pictures(side=40)
    mean, std = (torch.tensor(v)[:, None, None] for v in statistics(preprocessor if kind == "dinov2" else {}))
    with torch.no_grad():
        result = tower(pixel_values=(resized(pixels, side) / 255 - mean) / std)
    expected = result.last_hidden_state.mean(1) if kind == "siglip" else result.pooler_output
    assert torch.allclose(network(pixels), expected, atol=1e-5)
    about = network.describe()
    assert about["width"] == 32 and about["input"].startswith(f"{side} px") and len(about["hash"]) == 64


def test_a_model_that_does_not_encode_images_is_one_sentence(tmp_path, tokenizer_folder, monkeypatch):
    tiny.language(tokenizer_folder).save(tmp_path / "tongue")
    with pytest.raises(ConfigError, match=r"features=.*tongue: 'llama' cannot be used, because it takes other inputs"):
        feature_network(str(tmp_path / "tongue"))
    monkeypatch.setattr(feature_networks, "cached_file", lambda *_: (_ for _ in ()).throw(OSError("no network.")))
    with pytest.raises(ConfigError, match=r"no run 'some/eye' in .*Nor can a model of this name be read.*no network"):
        feature_network("some/eye", tmp_path)
    with pytest.raises(ConfigError) as error:
        feature_network("emoji/features", tmp_path)
    assert "hub" not in str(error.value), "it is a recipe"


def test_a_run_without_a_vision_encoder_is_refused(tmp_path, tokenizer_folder):
    tiny = "{hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"
    overrides = ["experiment=llava/language_tiny", f"model.language.architecture={tiny}"]
    make_run(tmp_path, "tongue", [*overrides, f"model.language.tokenizer={tokenizer_folder}"], ["language"])
    with pytest.raises(ConfigError, match="no vision encoder; set features to a run of stage=contrastive"):
        feature_network("tongue", tmp_path)
    with pytest.raises(ConfigError, match=r"no run 'ton'.*Did you mean 'tongue'"):
        feature_network("ton", tmp_path)


def test_resizing_is_antialiased():
    stripes = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    stripes[..., ::2] = 255
    small = resized(stripes, 8).float()
    assert small.shape == (1, 3, 8, 8) and (small[..., 1:-1] - 127.5).abs().max() < 8
    assert resized(small, 8) is small


class FakeInception(torch.nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        self.asked = (name, features_list, feature_extractor_weights_path)

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8
        return (pixels.float().mean((2, 3)).double(),)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A machine with torch-fidelity; returns the folder of its weights."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_inception_returns_the_layer_of_fid(hub):
    torch.save({"weight": torch.zeros(2)}, hub / WEIGHTS)
    network = feature_network("inception")
    assert network.network.asked == ("inception-v3-compat", ["2048"], str(hub / WEIGHTS))  # type: ignore[attr-defined]
    assert (
        torch.equal(network(pictures()), pictures().float().mean((2, 3))) and network(pictures()).dtype == torch.float32
    )
    about = network.describe()
    assert about["stand_in"] is False and about["width"] == 2048 and len(about["hash"]) == 16
    torch.save({"weight": torch.ones(2)}, hub / WEIGHTS)
    assert feature_network("inception").describe()["hash"] != about["hash"]


def test_inception_without_its_weights(hub):
    with pytest.raises(ConfigError, match=f"{WEIGHTS}; download them from https://"):
        feature_network("inception")


def test_weights_that_are_code_are_refused(hub):
    (hub / WEIGHTS).write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(ConfigError, match="plain tensors"):
        feature_network("inception")


def test_inception_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ConfigError, match=r"needs the package torch-fidelity.*contrastive run"):
        feature_network(feature_networks.INCEPTION)
