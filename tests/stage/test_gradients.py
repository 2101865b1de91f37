"""Each weight that a stage trains has a gradient: without, data parallelism refuses a run, and weights are counted as
learning that never move."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from mmlab.data.index import ShardIndex
from mmlab.data.module import ShardDataModule
from mmlab.model.conditioner import ClassCondition
from mmlab.model.config import ClassConditionConfig, DiTConfig, UNetConfig
from mmlab.model.denoiser import DiffusionModel, UNet
from mmlab.model.dit import DiT
from mmlab.model.language import LanguageOnly
from mmlab.stage.config import (
    ContrastivePretrainingConfig,
    EndToEndFinetuningConfig,
    LanguagePretrainingConfig,
    ProjectorAlignmentConfig,
    QFormerAlignmentConfig,
    QFormerPretrainingConfig,
)
from tests.model import tiny
from tests.model.tiny_priors import KINDS, conditioner, prior_model
from tests.stage import tiny_adversarial
from tests.stage.tiny_codes import code_data, code_stage, make_maps
from tests.stage.tiny_diffusion import NAMES, TinyFirstStage, diffusion_stage, image_data
from tests.stage.tiny_stage import CAPTIONS, QUESTIONS, TOWERS, data_of, dual_encoder, fit, make_stage
from tests.tiny_shapes import make_shapes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Drawn scenes with a tokenizer beside them, and maps."""
    root = make_shapes(tmp_path_factory.mktemp("shapes"))
    make_maps(root, 8, "maps")
    return root


def vision_language(kind: str, root: Path) -> Any:
    tokenizer = root / "tokenizer"
    every = ["vision", "connector", "language"]
    qformer_parts = ["qformer", "words", "contrast", "match"]
    config, build = {
        "contrastive": (ContrastivePretrainingConfig(trainable=TOWERS), dual_encoder),
        "align": (ProjectorAlignmentConfig(trainable=["connector"], prompt=CAPTIONS), tiny.vlm),
        "finetune": (EndToEndFinetuningConfig(trainable=every[1:], prompt=QUESTIONS), tiny.vlm),
        "vision": (EndToEndFinetuningConfig(trainable=every, prompt=QUESTIONS), tiny.vlm),
        "qformer": (EndToEndFinetuningConfig(trainable=[*every, "qformer"], prompt=QUESTIONS), tiny.minigpt4),
        "qformer_align": (QFormerAlignmentConfig(trainable=["connector"], prompt=QUESTIONS), tiny.minigpt4),
        "qformer_pretraining": (QFormerPretrainingConfig(trainable=qformer_parts), tiny.image_text_qformer),
        "language": (LanguagePretrainingConfig(trainable=["language"], prompt=QUESTIONS), language_alone),
    }[kind]
    return make_stage(config, build(tokenizer))


def language_alone(tokenizer: Path) -> LanguageOnly:
    return LanguageOnly(tiny.language(tokenizer))


def diffusion(kind: str, root: Path) -> Any:
    """A class as a vector for a DiT, or a text as context for a UNet."""
    sizes: dict[str, Any] = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    denoiser = {
        "dit": partial(DiT, DiTConfig(depth=2, width=32, heads=4, patch=2)),
        "unet": partial(UNet, UNetConfig(architecture={**sizes, "attention_head_dim": 4})),
    }[kind]
    told = (
        ClassCondition(ClassConditionConfig(classes=NAMES, width=32, dropout=0.5))
        if kind == "dit"
        else conditioner("text", root / "tokenizer")
    )
    torch.manual_seed(0)
    return diffusion_stage(DiffusionModel(TinyFirstStage(), told, denoiser))


class Gradients(L.Callback):
    """Notes what learns, and which of it had a gradient at the optimizers' steps."""

    def __init__(self) -> None:
        self.learns: set[str] = set()
        self.moved: set[str] = set()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        for name, weight in pl_module.model.named_parameters():
            if weight.requires_grad:
                self.learns.add(name)
            if weight.grad is not None:
                self.moved.add(name)


def test_contrastive_on_two_processes(root):
    """Data parallelism looks for weights without a gradient at the second step."""
    stage = vision_language("contrastive", root)
    before = stage.model.similarity.bias.clone()
    fit(stage, data_of(stage, [root / "train"], micro_batch=4), 3, devices=2)
    assert not torch.equal(stage.model.similarity.bias, before)


def without_gradient(stage: Any, data: ShardDataModule) -> list[str]:
    seen = Gradients()
    fit(stage, data, 1, callbacks=[seen])
    assert seen.learns
    return sorted(seen.learns - seen.moved)


PAIRS = ["contrastive", "qformer_pretraining"]
CHATS = ["align", "finetune", "vision", "qformer", "qformer_align", "language"]


@pytest.mark.parametrize("kind", [*PAIRS, *CHATS])
def test_stages_of_vision_and_language(root, kind):
    stage = vision_language(kind, root)
    assert without_gradient(stage, data_of(stage, [root / "train"])) == []


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_latent_diffusion(root, kind):
    stage = diffusion(kind, root)
    assert without_gradient(stage, image_data(stage, ShardIndex.open(root / "maps"))) == []


@pytest.mark.parametrize("kind", KINDS)
def test_code_prior(root, kind):
    stage = code_stage(prior_model(kind, root / "tokenizer"))
    assert without_gradient(stage, code_data(stage, ShardIndex.open(root / "maps"))) == []


@pytest.mark.parametrize(("kind", "codebook"), [("kl", {}), ("vq", {}), ("vq", {"ema": 0.9})])
def test_autoencoder(root, kind, codebook):
    stage = tiny_adversarial.stage(kind, codebook=codebook)
    assert without_gradient(stage, tiny_adversarial.data_of(stage, root)) == []
