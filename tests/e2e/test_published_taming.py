"""The published recipes of VQGAN and its priors have the published parameter counts and settings.

Counts are from the papers, or else from the released configurations. Nothing here is read from conf/.
"""

from dataclasses import dataclass

import pytest
import torch
from omegaconf import DictConfig

from mmlab.config.build import build
from mmlab.config.compose import compose, conf_dir
from mmlab.config.fields import check_fields
from mmlab.runs.check import check_process, check_trainable
from mmlab.training.trainable import count_parameters, set_trainable

VQGAN = 71.7  # millions, without the codebook
BASE = 4.5e-6  # learning rate per image in the batch


@dataclass
class Published:
    """A model and its training, as published."""

    codes: int
    prior: float | None = None  # millions
    layers: tuple[int, int, int] = (0, 0, 0)  # depth, heads, width
    reads: str = "none"
    top_k: int | None = None
    top_p: float | None = None
    dropout: float = 0.0


MODELS = {
    "imagenet_vqgan_f16_1024": Published(1024),
    "imagenet_vqgan_f16_16384": Published(16384),
    "ffhq_vqgan_f16_1024": Published(1024),
    "coco_vqgan_f16_8192": Published(8192),
    "imagenet_prior": Published(16384, 1410.0, (48, 24, 1536), "class", 600, 0.92),
    "ffhq_prior": Published(1024, 304.7, (24, 16, 1024), top_k=250),
    "coco_scene_prior": Published(8192, 978.0, (40, 16, 1408), "map", dropout=0.1),
}


@pytest.fixture(scope="module", params=MODELS)
def recipe(request) -> tuple[Published, DictConfig]:
    return MODELS[request.param], compose("train", [f"experiment=taming/{request.param}"])


def test_every_published_recipe_is_checked_here():
    pages = (conf_dir() / "experiment" / "taming").glob("*.yaml")
    assert {page.stem for page in pages if "# Published: " in page.read_text(encoding="utf-8")} == set(MODELS)


def test_parameter_counts(recipe):
    published, cfg = recipe
    with torch.device("meta"):
        model = build(cfg.model)
    set_trainable(model, list(cfg.stage.trainable))
    parts = count_parameters(model)
    counts = {part: sum(count.values()) / 1e6 for part, count in parts.items()}
    book = published.codes * 256 / 1e6
    assert counts["first_stage"] == pytest.approx(VQGAN + book, rel=0.005)
    assert model.first_stage.factor == 16 and cfg.data.size == 256
    if published.prior is None:
        # 3 layers of width 64, without the paper's batch norm.
        assert counts["discriminator"] == pytest.approx(2.77, rel=0.01)
        return
    assert counts["prior"] == pytest.approx(published.prior, rel=0.003)
    assert (cfg.model.prior.depth, cfg.model.prior.heads, cfg.model.prior.width) == published.layers
    assert (model.conditioner.reads, model.prior.side, model.prior.codes) == (published.reads, 16, published.codes)
    trained = {part for part, count in parts.items() if count["trainable"]}
    assert trained == ({"prior"} if published.reads == "none" else {"prior", "conditioner"})


def test_the_settings_are_the_published_ones(recipe):
    published, cfg = recipe
    assert cfg.optim.lr == pytest.approx(BASE * cfg.data.global_batch) and cfg.optim.schedule == "constant"
    if published.prior is None:
        assert (cfg.stage.reduction, cfg.stage.adversarial_weight, cfg.stage.codebook_weight) == ("mean", 0.8, 1.0)
        start = 30001 if "ffhq" in cfg.run.name else 250001  # faces; ImageNet
        assert cfg.stage.adversarial_start == start and list(cfg.optim.betas) == [0.5, 0.9]
        assert not cfg.model.first_stage.quantizer.legacy, "beta weights the commitment term except in old checkpoints"
        return
    assert (list(cfg.optim.betas), cfg.optim.weight_decay) == ([0.9, 0.95], 0.01)
    assert (cfg.sampler.top_k, cfg.sampler.top_p, cfg.sampler.temperature) == (published.top_k, published.top_p, 1)
    assert cfg.model.prior.dropout == published.dropout
    assert published.reads == "none" or cfg.model.conditioner.dropout == 0, "the paper drops no conditions"


def test_a_recipe_passes_the_checks_and_its_batch_divides(recipe):
    _, cfg = recipe
    check_fields(cfg)
    check_trainable(cfg)
    check_process(cfg)
    assert cfg.data.global_batch % (8 * cfg.data.micro_batch) == 0 and cfg.trainer.strategy == "ddp"


def test_the_gumbel_model():
    """f 8, 8,192 codes, whose logits come from a linear layer."""
    options = ["model=code_prior", "model/first_stage=vqgan_f8_gumbel", "data=imagenet", "stage=code_prior"]
    cfg = compose("train", [*options, "trainer.max_steps=1"])
    with torch.device("meta"):
        model = build(cfg.model)
    assert (model.first_stage.factor, model.first_stage.quantizer.codes) == (8, 8192)
    assert model.first_stage.quantizer.logits.weight.shape == (8192, 256, 1, 1)
    book = cfg.model.first_stage.quantizer
    annealed = (book.temperature, book.last_temperature, book.anneal_steps)
    assert (book.kl_weight, annealed) == (1e-8, (0.9, 1e-6, 1000001)), "as in its released configuration"
