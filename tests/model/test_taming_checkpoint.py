"""Checkpoints in the layout of taming-transformers and latent diffusion compute here what they compute there.

The reference below reads that layout as it stands: names, shapes and order are those of the released models.
"""

import sys
import types
from collections import OrderedDict, defaultdict
from datetime import datetime

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mmlab import cli
from mmlab.config.build import build
from mmlab.config.compose import compose
from mmlab.config.errors import ConfigError, RunError
from mmlab.model.autoencoder import VQAutoencoder
from mmlab.model.gumbel_quantizer import GumbelQuantizer
from mmlab.model.quantizer import VectorQuantizer
from mmlab.model.taming_checkpoint import from_taming, read_taming, settings_of
from mmlab.weights import verify_files

CH, MULT, BLOCKS, ATTENTION, Z, WIDTH, CODES = 32, (1, 2), 1, (False, True), 8, 4, 12
"""Two levels: f 2; attention at the second one."""


class Weights(dict):
    """Random weights that are made when they are first asked for, in the layout's shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = torch.Generator().manual_seed(0)

    def get_or_make(self, name: str, *shape: int) -> Tensor:
        if name not in self:
            drawn = torch.randn(*shape, generator=self.drawn)
            small = 0.1 * drawn + (len(shape) == 1 and ".norm" in name and name.endswith("weight"))
            self[name] = small if len(shape) == 1 else drawn / drawn[0].numel() ** 0.5
        return self[name]

    def conv(self, name: str, x: Tensor, out: int, size: int, **options: int) -> Tensor:
        weight = self.get_or_make(f"{name}.weight", out, x.shape[1], size, size)
        return F.conv2d(x, weight, self.get_or_make(f"{name}.bias", out), **options)

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (self.get_or_make(f"{name}.{kind}", x.shape[1]) for kind in ("weight", "bias"))
        return F.group_norm(x, 32, weight, bias, eps=1e-6)

    def resnet(self, name: str, x: Tensor, out: int) -> Tensor:
        hidden = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), out, 3, padding=1)
        hidden = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", hidden)), out, 3, padding=1)
        return hidden + (x if x.shape[1] == out else self.conv(f"{name}.nin_shortcut", x, out, 1))

    def attention(self, name: str, x: Tensor) -> Tensor:
        hidden, channels = self.norm(f"{name}.norm", x), x.shape[1]
        q, k, v = (self.conv(f"{name}.{part}", hidden, channels, 1).flatten(2) for part in "qkv")
        weight = torch.einsum("bci,bcj->bij", q, k).mul(channels**-0.5).softmax(2)
        mixed = torch.einsum("bij,bcj->bci", weight, v).view_as(x)
        return x + self.conv(f"{name}.proj_out", mixed, channels, 1)

    def middle(self, half: str, x: Tensor) -> Tensor:
        x = self.resnet(f"{half}.mid.block_1", x, x.shape[1])
        return self.resnet(f"{half}.mid.block_2", self.attention(f"{half}.mid.attn_1", x), x.shape[1])

    def encode(self, x: Tensor) -> Tensor:
        """Pixels → latents before they are quantised."""
        x = self.conv("encoder.conv_in", x, CH, 3, padding=1)
        for level, (mult, attends) in enumerate(zip(MULT, ATTENTION, strict=True)):
            for block in range(BLOCKS):
                x = self.resnet(f"encoder.down.{level}.block.{block}", x, CH * mult)
                x = self.attention(f"encoder.down.{level}.attn.{block}", x) if attends else x
            if level + 1 < len(MULT):
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), CH * mult, 3, stride=2)
        x = F.silu(self.norm("encoder.norm_out", self.middle("encoder", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x, Z, 3, padding=1), WIDTH, 1)

    def decode(self, z: Tensor) -> Tensor:
        """Vectors of codes → pixels."""
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z, Z, 1), CH * MULT[-1], 3, padding=1)
        x = self.middle("decoder", x)
        for level in reversed(range(len(MULT))):
            for block in range(BLOCKS + 1):
                x = self.resnet(f"decoder.up.{level}.block.{block}", x, CH * MULT[level])
                x = self.attention(f"decoder.up.{level}.attn.{block}", x) if ATTENTION[level] else x
            if level:
                x = F.interpolate(x, scale_factor=2.0)
                x = self.conv(f"decoder.up.{level}.upsample.conv", x, CH * MULT[level], 3, padding=1)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), 3, 3, padding=1)

    def codes(self, z: Tensor, gumbel: bool) -> tuple[Tensor, Tensor]:
        """Codes of latents, and their vectors."""
        spread = z.permute(0, 2, 3, 1).flatten(0, 2)[:: z[:, 0].numel() // CODES][:CODES]
        if gumbel:
            away = spread - z.mean((0, 2, 3))
            self["quantize.proj.weight"] = away[:, :, None, None] / away.norm(dim=1)[:, None, None, None]
            self["quantize.proj.bias"] = -self["quantize.proj.weight"][:, :, 0, 0] @ z.mean((0, 2, 3))
            indices = self.conv("quantize.proj", z, CODES, 1).argmax(1)
            book = self.get_or_make("quantize.embed.weight", CODES, WIDTH)
        else:
            book = self["quantize.embedding.weight"] = spread.clone()
            indices = torch.cdist(z.permute(0, 2, 3, 1).flatten(0, 2), book).argmin(1).view(len(z), *z.shape[2:])
        return indices, book[indices].permute(0, 3, 1, 2)


def reference(gumbel: bool = False) -> tuple[Weights, Tensor, Tensor, Tensor, Tensor]:
    """Weights, pictures, latents, codes and reconstructions."""
    weights, x = Weights(), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    z = weights.encode(x)
    indices, vectors = weights.codes(z, gumbel)
    return weights, x, z, indices, weights.decode(vectors)


@pytest.mark.parametrize("gumbel", [False, True])
@torch.no_grad()
def test_it_computes_what_the_checkpoint_does(gumbel):
    weights, x, z, indices, pixels = reference(gumbel)
    model = from_taming(weights, "it").eval()
    torch.testing.assert_close(model.encode(x).mean, z, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.codes(x), indices) and len(indices.unique()) > 3
    torch.testing.assert_close(model.decode(z), pixels, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.decode_codes(indices), pixels, rtol=1e-4, atol=1e-4)
    assert isinstance(model.quantizer, GumbelQuantizer if gumbel else VectorQuantizer)
    assert not model.measured and not model.untrained and model.factor == 2


def lightning(path, weights, prefix: str = "") -> None:
    """A checkpoint as Lightning wrote it: the discriminator's weights, and a class's name, beside the autoencoder's."""
    names = {name: types.ModuleType(name) for name in ("pytorch_lightning", "pytorch_lightning.callbacks")}
    names["m"] = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    kept = {module.__name__: sys.modules.get(module.__name__) for module in names.values()}
    kind = type("ModelCheckpoint", (), {"__module__": names["m"].__name__})
    names["m"].ModelCheckpoint = kind  # type: ignore[attr-defined]
    sys.modules.update({module.__name__: module for module in names.values()})
    state = {f"{prefix}{name}": value for name, value in weights.items()}
    other = {f"{prefix}loss.discriminator.main.0.weight": torch.zeros(3), "model.diffusion_model.out": torch.zeros(2)}
    try:
        torch.save({"epoch": 3, "callbacks": {kind: {"best": 1.0}}, "state_dict": {**state, **other}}, path)
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


@torch.no_grad()
def test_files_of_both_code_bases(tmp_path):
    weights, x, _, indices, _ = reference()
    lightning(tmp_path / "taming.ckpt", weights)
    lightning(tmp_path / "ldm.ckpt", weights, "first_stage_model.")
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "plain.safetensors")
    for name in ("taming.ckpt", "ldm.ckpt", "plain.safetensors"):
        assert torch.equal(from_taming(read_taming(tmp_path / name), name).eval().codes(x), indices), name


@torch.no_grad()
def test_the_command_and_the_config_that_it_prints(tmp_path, monkeypatch, capsys):
    weights, x, _, indices, _ = reference()
    lightning(tmp_path / "last.ckpt", weights)
    assert cli.main(["convert", "taming", str(tmp_path / "last.ckpt"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "legacy: true" in said and f"source: {tmp_path / 'out'}" in said
    settings = yaml.safe_load(said.partition("\n")[2])["model"]["first_stage"]
    option = tmp_path / "conf" / "model" / "first_stage" / "mine.yaml"
    option.parent.mkdir(parents=True)
    option.write_text(yaml.safe_dump({"defaults": ["/schema/VQAutoencoderConfig@_here_", "_self_"], **settings}))
    monkeypatch.chdir(tmp_path)
    parts = ["model/first_stage=mine", "data=imagenet", "stage=code_prior", "trainer.max_steps=1"]
    cfg = compose("train", ["model=code_prior", *parts])
    model = build(cfg.model.first_stage).eval()
    model.load_pretrained()
    assert isinstance(model, VQAutoencoder) and model.quantizer.config.legacy and not model.untrained
    assert torch.equal(model.codes(x), indices)
    verify_files(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"config\.json has changed"):
        verify_files(tmp_path / "out")


class Namespace(dict):
    """Hyper-parameters as Lightning keeps them."""


class Trap:
    def __reduce__(self):
        return open, ("ran", "w")


@torch.no_grad()
def test_whatever_lies_beside_the_weights_is_not_run(tmp_path, monkeypatch):
    weights, x, _, indices, _ = reference()
    monkeypatch.chdir(tmp_path)
    config = OmegaConf.create({"model": {"target": "taming.models.vqgan.VQModel", "params": {"ddconfig": [1, 2]}}})
    beside = {
        "hyper_parameters": Namespace(lr=np.float64(0.1), config=config),
        "callbacks": {types.SimpleNamespace: {"best": np.float32(1), "seen": {1, 2}, "of": defaultdict(list, a=[1])}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "path": tmp_path, "shape": torch.Size([2])}],
        "trap": [Trap()],
        "bound": tmp_path.joinpath,
        "date": datetime(2020, 1, 1),
    }
    state = OrderedDict({name: torch.nn.Parameter(value) for name, value in weights.items()})
    for protocol in (2, 4):
        torch.save({**beside, "state_dict": state}, tmp_path / "full.ckpt", pickle_protocol=protocol)
        read = read_taming(tmp_path / "full.ckpt")
        assert not (tmp_path / "ran").exists()
        assert all(torch.equal(value, weights[name]) for name, value in read.items()) and read.keys() == weights.keys()
    assert torch.equal(from_taming(read, "it").eval().codes(x), indices)


@torch.no_grad()
def test_a_codebook_of_averages(tmp_path):
    weights, x, _, indices, pixels = reference()
    averages = {"cluster_size": torch.arange(float(CODES)), "embed_avg": torch.zeros(CODES, WIDTH)}
    weights = {**weights, **{f"quantize.embedding.{name}": value for name, value in averages.items()}}
    model = from_taming(weights, "it")
    assert isinstance(model.quantizer, VectorQuantizer) and model.quantizer.config.ema == 0.99
    assert torch.equal(model.eval().codes(x), indices)
    torch.testing.assert_close(model.decode_codes(indices), pixels, rtol=1e-4, atol=1e-4)
    again = model.quantizer.ema_sums / model.quantizer.ema_uses[:, None]
    torch.testing.assert_close(again, model.quantizer.codebook, rtol=1e-5, atol=1e-6)
    assert settings_of(model)["quantizer"]["legacy"] is False


def test_what_it_is_not(tmp_path, capsys):
    weights = reference()[0]
    torch.save({"state_dict": {"model.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(ConfigError, match=r"has no VQ autoencoder of .*; it contains model"):
        read_taming(tmp_path / "other.ckpt")
    torch.save({0: torch.zeros(2)}, tmp_path / "numbers.ckpt")
    with pytest.raises(ConfigError, match=r"has no VQ autoencoder of .*; it contains 0"):
        read_taming(tmp_path / "numbers.ckpt")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"empty\.ckpt is not a checkpoint of only tensors and plain data\.$"):
        read_taming(tmp_path / "empty.ckpt")
    torch.save(types.SimpleNamespace(weights=weights), tmp_path / "object.ckpt")
    with pytest.raises(ConfigError, match=r"object\.ckpt holds a types\.SimpleNamespace, not a dict of weights"):
        read_taming(tmp_path / "object.ckpt")
    torch.save({"state_dict": weights}, tmp_path / "cut.ckpt")
    whole = (tmp_path / "cut.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"cut\.ckpt is not a checkpoint of|cut\.ckpt cannot be read"):
        read_taming(tmp_path / "cut.ckpt")
    old = {"_use_new_zipfile_serialization": False}
    torch.save({"state_dict": dict(weights)}, tmp_path / "old.ckpt", **old)
    assert read_taming(tmp_path / "old.ckpt").keys() == weights.keys()
    torch.save({"state_dict": weights}, tmp_path / "older.ckpt", **old)
    with pytest.raises(ConfigError, match=r"before 1\.6 it names tests\.model\.\w+\.Weights, so save"):
        read_taming(tmp_path / "older.ckpt")
    with pytest.raises(ConfigError, match=r"quantizer has the weights embedding\.weight, used; taming"):
        from_taming({**weights, "quantize.used": torch.arange(3)}, "it")
    with pytest.raises(ConfigError, match=r"quantizer has the weights layers\.0\.codebook; .* can be converted"):
        others = {name: value for name, value in weights.items() if not name.startswith("quantize.")}
        from_taming({**others, "quantize.layers.0.codebook": torch.zeros(3, 4)}, "it")
    with pytest.raises(ConfigError, match=r"not a VQ autoencoder of a known layout: .*encoder\.down\.0\.strange"):
        from_taming({**weights, "encoder.down.0.strange.weight": torch.zeros(1)}, "it")
    with pytest.raises(ConfigError, match=r"known layout: 'encoder\.down\.0' is missing or unknown"):
        from_taming({name: value for name, value in weights.items() if name.startswith("quant")}, "it")
    short = {name: value for name, value in weights.items() if name != "decoder.mid.block_1.conv1.bias"}
    with pytest.raises(
        ConfigError, match=r"does not fit .*decoder\.mid_block\.resnets\.0\.conv1\.bias is nothing there"
    ):
        from_taming(short, "it")
    for argv, says in (
        (["tamin", "x", "y"], "Did you mean 'taming'"),
        (["taming", str(tmp_path), "y"], "is a folder; name the .ckpt or .safetensors file in it."),
        (["taming", str(tmp_path / "othr.ckpt"), "y"], "other.ckpt'?"),
        (["taming", str(tmp_path / "other.ckpt"), str(tmp_path)], "is not empty; choose another folder"),
        (["taming", "x"], "see `mmlab convert --help`"),
    ):
        assert cli.main(["convert", *argv]) == 2
        assert says in capsys.readouterr().err
