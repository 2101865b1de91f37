import json

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from omegaconf import OmegaConf
from safetensors.torch import load_file

from mmlab.config.build import build
from mmlab.config.compose import compose, conf_dir
from mmlab.config.errors import ConfigError
from mmlab.model.autoencoder import KLAutoencoder
from mmlab.model.config import KLAutoencoderConfig
from mmlab.training.artifacts import SavesItself, describe
from mmlab.weights import content_hash
from tests.model import tiny_autoencoders as tiny

MEAN, STD = torch.tensor([0.1, -2.3, 1 / 3]), torch.tensor([0.7, 5.1, 1e-3])


def test_the_kl_autoencoder_computes_what_diffusers_does():
    stage, x = tiny.kl().eval(), tiny.pictures()
    theirs = stage.vae.encode(x).latent_dist
    ours = stage.encode(x)
    assert ours.mean.shape == (2, stage.channels, 16 // stage.factor, 16 // stage.factor) == (2, 3, 4, 4)
    assert torch.equal(ours.mean, theirs.mean) and torch.equal(ours.logvar, theirs.logvar)
    torch.testing.assert_close(ours.kl(), theirs.kl())
    assert torch.equal(stage.decode(ours.mean), stage.vae.decode(ours.mean).sample)
    assert torch.equal(stage.reconstruct(ours.mean).pixels, stage.decode(ours.mean))


def test_the_log_variance_is_bounded():
    stage = tiny.kl()
    with torch.no_grad():
        stage.vae.quant_conv.bias[3:] = torch.tensor([100.0, -100.0, 0.0])
    logvar = stage.encode(tiny.pictures()).logvar
    assert logvar is not None and (logvar[:, 0].max(), logvar[:, 1].min()) == (20, -30)


def test_without_1x1_convolutions_it_works_too():
    stage, x = tiny.kl(use_quant_conv=False, use_post_quant_conv=False).eval(), tiny.pictures()
    assert torch.equal(stage.encode(x).mean, stage.vae.encode(x).latent_dist.mean)
    assert torch.equal(stage.decode(torch.ones(1, 3, 4, 4)), stage.vae.decode(torch.ones(1, 3, 4, 4)).sample)


def test_an_artifact_is_a_diffusers_folder_that_comes_back_exactly(tmp_path):
    stage, x = tiny.kl().eval(), tiny.pictures()
    stage.set_statistics(MEAN, STD)
    assert isinstance(stage, SavesItself)
    stage.save(tmp_path)
    plain = AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    assert torch.equal(plain.encode(x).latent_dist.mean, stage.encode(x).mean)
    source, filled = KLAutoencoder(KLAutoencoderConfig(source=str(tmp_path))).eval(), tiny.kl().eval()
    source.load_pretrained()
    filled.load(tmp_path)
    for again in (source, filled):
        assert again.measured and torch.equal(again.latent_mean, MEAN) and torch.equal(again.latent_std, STD)
        assert torch.equal(again.decode(again.encode(x).mean), stage.decode(stage.encode(x).mean))
        assert content_hash(again) == content_hash(stage)
        assert json.loads(json.dumps(describe(again))) == describe(stage)


def test_an_unmeasured_artifact_comes_back_unmeasured(tmp_path):
    tiny.kl().save(tmp_path)
    assert not KLAutoencoder(KLAutoencoderConfig(source=str(tmp_path))).measured
    measured = tiny.kl()
    measured.set_statistics(MEAN, STD)
    measured.load(tmp_path)
    assert not measured.measured, "the statistics were of other weights"


@pytest.mark.parametrize(
    ("stated", "mean", "std"),
    [
        ({"scaling_factor": 0.18215}, [0, 0, 0], [1 / 0.18215] * 3),
        ({"scaling_factor": 1.5, "shift_factor": 0.06}, [0.06] * 3, [1 / 1.5] * 3),
        ({"scaling_factor": 0.5, "latents_mean": [1.0, 2, 3], "latents_std": [4.0, 5, 6]}, [1, 2, 3], [8, 10, 12]),
    ],
)
def test_a_foreign_folder_s_scaling_is_read(tmp_path, stated, mean, std):
    AutoencoderKL(
        **tiny.SIZES,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        latent_channels=3,
        **stated,
    ).save_pretrained(tmp_path)
    stage = KLAutoencoder(KLAutoencoderConfig(source=str(tmp_path)))
    stage.load_pretrained()
    assert stage.measured
    torch.testing.assert_close(stage.latent_mean, torch.tensor(mean).float())
    torch.testing.assert_close(stage.latent_std, torch.tensor(std).float())
    # Nothing new was measured, so pipelines find what they know.
    stage.save(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name: config[name] for name in stated} == stated


def test_an_artifact_of_another_architecture_is_refused(tmp_path):
    tiny.kl().save(tmp_path)
    with pytest.raises(ConfigError, match="it has act_fn=silu, not relu"):
        tiny.kl(act_fn="relu").load(tmp_path)
    with pytest.raises(ConfigError, match="it has latent_channels=3, not 5"):
        tiny.kl(latent_channels=5).load(tmp_path)


def test_a_folder_with_a_weight_missing_is_refused(tmp_path):
    from safetensors.torch import save_file

    tiny.kl().save(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    del weights["decoder.conv_out.bias"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ConfigError, match=r"1 weights are missing, such as decoder\.conv_out\.bias"):
        KLAutoencoder(KLAutoencoderConfig(source=str(tmp_path))).load_pretrained()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: KLAutoencoder(KLAutoencoderConfig()), "source is not set"),
        (lambda: KLAutoencoder(KLAutoencoderConfig(source="/nowhere")), "source=/nowhere is not an AutoencoderKL"),
        (lambda: tiny.kl(latent_chanels=3), "Did you mean 'latent_channels'"),
        (lambda: KLAutoencoder(KLAutoencoderConfig(init="random", architecture={})), "needs block_out_channels"),
        (
            lambda: KLAutoencoder(KLAutoencoderConfig(init="random", architecture={"block_out_channels": 8})),
            "block_out_channels, a list",
        ),
        (lambda: tiny.kl(norm_num_groups=3), r"does not fit together: num_channels"),
        (lambda: tiny.kl(down_block_types=["DownEncoderBlock2D"]), "down_block_types has 1 blocks"),
        (lambda: tiny.vq({"latent_chanels": 3}), "Did you mean 'latent_channels'"),
        (lambda: tiny.vq({"norm_num_groups": 3}), "does not fit together"),
        (lambda: tiny.vq({"scaling_factor": 3}), "has no field 'scaling_factor'"),
    ],
)
def test_wrong_architectures_are_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


@pytest.mark.parametrize("normalize", [True, False])
def test_vq_encodes_before_and_decodes_behind_the_codebook(normalize):
    stage, x = tiny.vq({"latent_channels": 6}, normalize=normalize).eval(), tiny.pictures()
    assert stage.encoder.conv_out.out_channels == stage.decoder.conv_in.in_channels == 6
    z = stage.encode(x)
    assert z.logvar is None and z.mean.shape == (2, stage.channels, 4, 4) == (2, 4, 4, 4)
    hidden = stage.quant_conv(stage.encoder(x))
    wanted = hidden / hidden.norm(dim=1, keepdim=True) if normalize else hidden
    torch.testing.assert_close(z.mean, wanted)
    codes = stage.quantizer(z.mean)
    assert not torch.allclose(codes.values, z.mean, atol=0.01), "these latents are no codes yet"
    pixels = stage.decoder(stage.post_quant_conv(codes.values))
    torch.testing.assert_close(stage.decode(z.mean), pixels)
    torch.testing.assert_close(stage.decode(codes.values), pixels)
    made = stage.reconstruct(z.mean)
    assert made.codes is not None and torch.equal(made.codes.indices, codes.indices)


def test_the_gradient_reaches_the_encoder_through_the_codebook():
    stage, x = tiny.vq(), tiny.pictures()
    stage.reconstruct(stage.encode(x).mean).pixels.sum().backward()
    first = stage.encoder.conv_in.weight.grad
    assert first is not None and first.abs().sum() > 0
    assert stage.quantizer.codebook.grad is None, "codes learn from their own loss alone"


def test_vq_comes_back_exactly(tmp_path):
    stage, x = tiny.vq(revive_after=5).eval(), tiny.pictures()
    stage.set_statistics(torch.arange(4.0), torch.full((4,), 1 / 3))
    stage.quantizer.uses += torch.arange(16)
    assert isinstance(stage, SavesItself)
    stage.save(tmp_path / "first_stage")
    torch.manual_seed(1)
    again = tiny.vq().eval()
    with torch.no_grad():
        again.quantizer.codebook.zero_()
    again.load(tmp_path / "first_stage")
    assert again.measured and torch.equal(again.latent_std, stage.latent_std)
    assert torch.equal(again.quantizer.uses, stage.quantizer.uses)
    assert torch.equal(again.decode(again.encode(x).mean), stage.decode(stage.encode(x).mean))
    assert content_hash(again) == content_hash(stage) and describe(again) == describe(stage)
    with pytest.raises(ConfigError, match="it has normalize=True, not False"):
        tiny.vq(normalize=False).load(tmp_path / "first_stage")
    with pytest.raises(ConfigError, match="is not a VQ autoencoder"):
        again.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_vq_artifact_is_one_sentence(tmp_path, name):
    tiny.vq().save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
    with pytest.raises(ConfigError, match="is not a VQ autoencoder"):
        tiny.vq().load(tmp_path)


# From the papers' tables and the released checkpoints; with the codebook, where there is one.
COUNTS = {
    "kl_f8": 83.65e6, "kl_f4": 55.3e6, "vq_f4": 55.3e6,
    "vqgan_f16": 71.7e6 + 1024 * 256, "vqgan_f16_16384": 71.7e6 + 16384 * 256,
}  # fmt: skip
SHAPES = {
    "identity": (3, 1),
    "kl_f2_tiny": (2, 2), "kl_tiny": (4, 4), "kl_f8_tiny": (8, 8), "kl_f8_small": (8, 8), "vq_tiny": (4, 4),
    "kl_f4": (3, 4), "kl_f8": (4, 8), "kl_f16": (16, 16),
    "vq_f4": (3, 4), "vq_f8": (4, 8), "vq_f16": (8, 16), "vqgan_f16": (256, 16),
    "vqgan_f16_16384": (256, 16), "vqgan_f8_gumbel": (256, 8),
}  # fmt: skip
CODES = {"vq_f4": 8192, "vq_f8": 16384, "vq_f16": 16384, "vqgan_f16": 1024, "vqgan_f16_16384": 16384}


def option(name: str):
    cfg = compose("train", ["experiment=ldm/first_stage_kl_tiny", f"model/first_stage={name}"])
    return build(OmegaConf.to_container(cfg.model.first_stage, resolve=True))  # type: ignore[arg-type]


def test_every_first_stage_is_checked_here():
    options = {path.stem for path in (conf_dir() / "model" / "first_stage").glob("*.yaml")}
    assert options - {"pretrained"} == set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_counts_are_the_published_ones(name):
    with torch.device("meta"):
        stage = option(name)
        shape = stage.encode(torch.zeros(1, 3, 64, 64)).mean.shape
    channels, factor = SHAPES[name]
    assert shape == (1, channels, 64 // factor, 64 // factor)
    assert (stage.channels, stage.factor) == (channels, factor)
    if name in COUNTS:
        assert sum(p.numel() for p in stage.parameters()) == pytest.approx(COUNTS[name], rel=0.01)
    if name in CODES:
        book = stage.quantizer.config
        assert (book.codes, book.normalize, book.beta) == (CODES[name], False, 0.25)
