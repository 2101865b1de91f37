"""The published recipes of image generation have the published parameter counts and settings.

Counts are in millions, from the papers; where these round, from the released networks. Nothing here is read from conf/.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from mmlab.config.build import build
from mmlab.config.compose import compose, conf_dir
from mmlab.config.fields import check_fields
from mmlab.runs.check import check_process, check_trainable
from mmlab.training.lora import add_adapters
from mmlab.training.trainable import count_parameters, set_trainable

KL_F8, VQ_F4 = 83.7, 55.3
LDM, SD, DDPM = ("scaled_linear", 0.0015, 0.0195), ("scaled_linear", 0.00085, 0.012), ("linear", 1e-4, 0.02)


@dataclass
class Published:
    """A model and its training, as published."""

    denoiser: float
    first_stage: float
    steps: int
    batch: int
    lr: float
    betas: tuple[str, float, float]
    latent: tuple[int, int]  # channels and side
    data: str
    weight_decay: float = 0.01  # the default of torch's AdamW, used by latent diffusion
    warmup: int = 0
    loss: str = "l2"
    conditioner: float = 0.0
    trainable: tuple[str, ...] = ("denoiser",)
    devices: int = 1
    flip: bool = False
    eta: float | None = None
    sampling: int = 200
    scale: float = 1.0


MODELS = {
    "diffusion/ddpm_cifar10": Published(
        35.7, 0.0, 800_000, 128, 2e-4, DDPM, (3, 32), "cifar10", weight_decay=0.0, warmup=5000, flip=True, sampling=50
    ),
    "ldm/ffhq_f4": Published(274.1, VQ_F4, 635_000, 42, 42 * 2e-6, LDM, (3, 64), "ffhq", eta=1),
    "ldm/celebahq_f4": Published(274.1, VQ_F4, 410_000, 48, 48 * 2e-6, LDM, (3, 64), "celebahq", eta=0),
    "ldm/bedrooms_f4": Published(274.1, VQ_F4, 1_900_000, 48, 48 * 2e-6, LDM, (3, 64), "bedrooms", flip=True, eta=1),
    "ldm/churches_f8": Published(
        295.0, KL_F8, 500_000, 96, 5e-5, ("scaled_linear", 0.0015, 0.0155), (4, 32), "churches",
        warmup=10_000, loss="l1", flip=True, eta=0, sampling=400,
    ),
    "ldm/imagenet_f4": Published(
        400.9, VQ_F4, 178_000, 1200, 1e-4, LDM, (3, 64), "imagenet",
        conditioner=1001 * 512 / 1e6, trainable=("denoiser", "conditioner"), devices=8, eta=1, sampling=250, scale=1.5,
    ),
    "ldm/text_f8": Published(
        872.3, KL_F8, 390_000, 680, 5e-5, SD, (4, 32), "laion",
        # Latent diffusion's own transformer has 0.58B, for the 1.45B of the name; transformers' BERT is wider inside.
        conditioner=669.4, trainable=("denoiser", "conditioner"), devices=8, sampling=250, scale=1.5,
    ),
    "ldm/imagenet_dit_xl_2": Published(
        675.0, KL_F8, 7_000_000, 256, 1e-4, DDPM, (4, 32), "imagenet", weight_decay=0.0,
        conditioner=1001 * 1152 / 1e6, trainable=("denoiser", "conditioner"), devices=8, flip=True, eta=1,
        sampling=250, scale=1.5,
    ),
    "ldm/sd15_finetune": Published(
        859.5, KL_F8, 15_000, 4, 1e-5, SD, (4, 64), "captions", conditioner=123.06, flip=True, sampling=50, scale=7.5,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def recipe(request) -> tuple[Published, DictConfig]:
    return MODELS[request.param], compose("train", [f"experiment={request.param}"])


def millions(model: torch.nn.Module) -> dict[str, float]:
    return {part: sum(count.values()) / 1e6 for part, count in count_parameters(model).items()}


def test_every_published_recipe_is_checked_here():
    """First stages are checked in tests/model."""
    recipes = set()
    for family in ("diffusion", "ldm"):
        for path in (conf_dir() / "experiment" / family).glob("*.yaml"):
            if "# Published: " in path.read_text(encoding="utf-8") and not path.stem.startswith("first_stage"):
                recipes.add(f"{family}/{path.stem}")
    assert recipes == set(MODELS)


def test_parameter_counts(recipe):
    published, cfg = recipe
    with torch.device("meta"):
        model = build(cfg.model)
    assert all(p.device.type == "meta" for p in model.parameters())
    set_trainable(model, list(cfg.stage.trainable))
    counts = millions(model)
    assert counts["denoiser"] == pytest.approx(published.denoiser, rel=0.01)
    assert counts["first_stage"] == pytest.approx(published.first_stage, rel=0.01)
    assert counts["conditioner"] == pytest.approx(published.conditioner, rel=0.001)
    trained = {part for part, count in count_parameters(model).items() if count["trainable"]}
    assert trained == {part for part in published.trainable if counts[part]}
    first_stage = model.first_stage
    assert (first_stage.channels, cfg.data.size // first_stage.factor) == published.latent


def test_the_settings_are_the_published_ones(recipe):
    published, cfg = recipe
    assert cfg.data.root == f"data/{published.data}"
    optim, trainer = cfg.optim, cfg.trainer
    assert (trainer.max_steps, trainer.max_epochs, cfg.data.global_batch) == (published.steps, None, published.batch)
    assert optim.lr == pytest.approx(published.lr)
    assert (optim.weight_decay, list(optim.betas), optim.schedule) == (published.weight_decay, [0.9, 0.999], "constant")
    assert round(optim.warmup_ratio * published.steps) == published.warmup
    assert (cfg.stage.loss, cfg.data.flip) == (published.loss, published.flip)
    assert cfg.callbacks.ema.decay == 0.9999
    process = build(cfg.process)
    schedule, start, end = published.betas
    settings = process.config
    assert (settings.schedule, settings.timesteps, settings.target, settings.min_snr_gamma) == (
        schedule, 1000, "epsilon", None
    )  # fmt: skip
    assert (process.betas[0].item(), process.betas[-1].item()) == pytest.approx((start, end))
    sampler = cfg.sampler
    assert (sampler.name, sampler.steps, sampler.eta, sampler.guidance.scale) == (
        "ddim", published.sampling, published.eta, published.scale,
    )  # fmt: skip


def test_a_recipe_passes_the_checks_and_its_batch_divides(recipe):
    published, cfg = recipe
    check_fields(cfg)
    check_trainable(cfg)
    check_process(cfg)
    assert cfg.data.global_batch % (published.devices * cfg.data.micro_batch) == 0
    assert (cfg.trainer.strategy == "ddp") == (published.devices > 1)


@pytest.mark.parametrize(("size", "count"), [("s", 33), ("b", 130), ("l", 458), ("xl", 675)])
def test_sizes_of_dit(size, count):
    """DiT, table 1, with ImageNet's 1,000 classes and the null class."""
    classes = ["model/conditioner=class", "model.conditioner.classes=1000"]
    width = "model.conditioner.width=${model.denoiser.width}"
    options = ["model=diffusion", f"model/denoiser=dit_{size}_2", "model/first_stage=kl_f8", *classes, width]
    cfg = compose("train", [*options, "data=imagenet", "stage=latent_diffusion", "process=ddpm", "trainer.max_steps=1"])
    with torch.device("meta"):
        counts = millions(build(cfg.model))
    assert counts["denoiser"] + counts["conditioner"] == pytest.approx(count, rel=0.01)


def test_stable_diffusion_can_be_composed():
    """SD 1: 860M in the UNet, 123M in CLIP's text encoder (which shares no weight with its vision half)."""
    options = ["model=diffusion", "model/denoiser=ldm_text_f8", "model/conditioner=clip_l", "model/first_stage=kl_f8"]
    rest = ["data=laion", "stage=latent_diffusion", "process=stable_diffusion", "trainer.max_steps=1"]
    with torch.device("meta"):
        counts = millions(build(compose("train", [*options, *rest]).model))
    assert counts["denoiser"] == pytest.approx(859.5, rel=0.001)
    assert counts["conditioner"] == pytest.approx(123.06, rel=0.001)


def test_lora_of_stable_diffusion():
    """diffusers' script trains 797,184 weights at rank 4: 128 layers of attention, in and out."""
    cfg = compose("train", ["experiment=ldm/sd15_lora"])
    with torch.device("meta"):
        model = build(cfg.model)
        set_trainable(model, list(cfg.stage.trainable), list(cfg.stage.lora))
        stage: Any = OmegaConf.to_object(cfg.stage)
        add_adapters(model, stage.lora)
    assert count_parameters(model)["denoiser"]["trainable"] == 797_184
    assert (cfg.trainer.max_epochs, cfg.data.global_batch, cfg.optim.lr) == (100, 1, 1e-4)
    lora = cfg.stage.lora.denoiser
    assert (lora.rank, lora.alpha, lora.dropout) == (4, 4, 0)
