"""Prismatic's recipes have the published parameter counts and settings.

The settings are those of `dinosiglip-384px-resize-naive+7b` in the conf/models.py of Prismatic VLMs (arXiv 2402.07865,
sections 4.1 and 4.2); the counts follow from the architectures' published sizes. Nothing here is read from conf/.
"""

import pytest
import torch

from mmlab.config.build import build
from mmlab.config.compose import compose, conf_dir
from mmlab.training.trainable import count_parameters, set_trainable

SIZES = {"7b": (4096, 6_738_415_616), "13b": (5120, 13_015_864_320)}
PATCHES = 27 * 27  # of 14 px in 384 px, for both encoders


def transformer(width: int, inner: int, layers: int, extra: int = 0) -> int:
    """Layers with two norms, four projections with biases, and an MLP; `extra` weights in each."""
    return layers * (4 * width + 4 * (width * width + width) + 2 * width * inner + inner + width + extra)


def dinov2_large() -> int:
    """DINOv2 ViT-L/14 with 4 registers: 24 layers with two layer scales, positions of 518 px, a norm, a mask token."""
    width = 1024
    embeddings = 3 * 14 * 14 * width + width + (37 * 37 + 1) * width + (1 + 4 + 1) * width
    return embeddings + transformer(width, 4096, 24, extra=2 * width) + 2 * width


def siglip_so400m() -> int:
    """SigLIP So400m/14 at 384 px: 27 layers, a norm, and a head that pools by attention."""
    width, inner = 1152, 4304
    embeddings = 3 * 14 * 14 * width + width + PATCHES * width
    head = width + transformer(width, inner, 1) - 2 * width  # a query, and one norm
    return embeddings + transformer(width, inner, 27) + 2 * width + head


def connector(width: int) -> int:
    fused = 1024 + 1152
    return (fused + 1) * 4 * fused + (4 * fused + 1) * width + (width + 1) * width


def test_every_recipe_is_checked_here():
    files = {path.stem for path in (conf_dir() / "experiment" / "prismatic").glob("*.yaml")}
    assert files == {f"dinosiglip_{size}" for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
def test_parameters(size):
    cfg = compose("train", [f"experiment=prismatic/dinosiglip_{size}"])
    with torch.device("meta"):
        model = build(cfg.model)
    set_trainable(model, list(cfg.stage.trainable))
    width, language = SIZES[size]
    assert dinov2_large() == 304_372_736 and siglip_so400m() == 428_225_600
    assert count_parameters(model) == {
        "vision": {"trainable": 0, "frozen": dinov2_large() + siglip_so400m()},
        "connector": {"trainable": connector(width), "frozen": 0},
        "language": {"trainable": language, "frozen": 0},
    }


@pytest.mark.parametrize("size", SIZES)
def test_settings(size):
    cfg = compose("train", [f"experiment=prismatic/dinosiglip_{size}"])
    assert (cfg.data.root, cfg.data.aspect, cfg.data.global_batch) == ("data/llava_mix_665k", "stretch", 128)
    optim = cfg.optim
    assert (optim.lr, optim.weight_decay, optim.warmup_ratio, optim.schedule) == (2e-5, 0.1, 0.03, "cosine")
    assert (cfg.trainer.max_epochs, cfg.trainer.max_steps, cfg.trainer.gradient_clip_val) == (1, None, 1.0)
    assert (list(cfg.stage.trainable), list(cfg.stage.init_from)) == (["connector", "language"], [])
    assert cfg.model.vision.first.source == "facebook/dinov2-with-registers-large"
    assert cfg.model.vision.second.source == "google/siglip-so400m-patch14-384"
    assert cfg.model.language.source == f"lmsys/vicuna-{size}-v1.5" and cfg.stage.prompt.template == "v1"


@pytest.mark.parametrize("page, pixels, tokens", [("dinosiglip_384", 384, 729), ("dinosiglip_224", 224, 256)])
def test_both_encoders_give_as_many_tokens(page, pixels, tokens):
    cfg = compose("train", ["experiment=prismatic/dinosiglip_7b", f"model/vision={page}"])
    with torch.device("meta"):
        vision = build(cfg.model.vision)
    assert (vision.image_size, vision.tokens_per_image, vision.width) == (pixels, tokens, 1024 + 1152)
    assert (vision.first.prefix, vision.second.prefix) == (5, 0)
    assert (vision.first.feature_layer, vision.second.feature_layer) == (-2, -2)
    assert vision.first.image_mean == [0.485, 0.456, 0.406] and vision.second.image_mean == [0.5, 0.5, 0.5]
