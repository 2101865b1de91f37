"""Adversarial autoencoders of 16-pixel pictures, and their training with checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from mmlab.data.config import ImageDataConfig
from mmlab.data.module import ShardDataModule
from mmlab.model.autoencoder import AutoencoderModel
from mmlab.model.config import PatchDiscriminatorConfig
from mmlab.model.discriminator import PatchDiscriminator
from mmlab.model.perceptual import StandIn
from mmlab.stage.autoencoder_training import AutoencoderTraining
from mmlab.stage.config import AutoencoderTrainingConfig
from mmlab.training.config import AdamWConfig
from mmlab.training.optim import AdamW
from tests.model import tiny_autoencoders as tiny
from tests.stage.tiny_stage import make_stage
from tests.tiny_shards import sources
from tests.tiny_trainer import run

PARTS = ["first_stage", "discriminator"]


def model(kind: str = "kl", **codebook: Any) -> AutoencoderModel:
    """Random weights, the same each time."""
    first_stage = tiny.kl() if kind == "kl" else tiny.vq(**codebook)
    return AutoencoderModel(first_stage, PatchDiscriminator(PatchDiscriminatorConfig(layers=2, width=8)), StandIn())


def stage(kind: str = "kl", lr: float = 2e-3, **options: Any) -> AutoencoderTraining:
    codebook = options.pop("codebook", {})
    config = AutoencoderTrainingConfig(trainable=PARTS, **{"adversarial_start": 0, **options})
    optim = AdamW(AdamWConfig(lr=lr, schedule="constant", warmup_ratio=0, betas=[0.5, 0.9]))
    return make_stage(config, model(kind, **codebook), optim=optim)


def data_of(
    module: AutoencoderTraining, root: Path, val: bool = True, global_batch: int = 8, micro_batch: int = 8
) -> ShardDataModule:
    data = ImageDataConfig(
        train=sources(root / "train"),
        val=sources(root / "val") if val else [],
        global_batch=global_batch,
        micro_batch=micro_batch,
        seed=0,
        size=16,
        aspect="stretch",
        flip=True,
    )
    return ShardDataModule(data, module.collate(data))


def train(
    module: L.LightningModule,
    data: ShardDataModule,
    folder: Path,
    steps: int,
    callbacks: Sequence[L.Callback] = (),
    **options: Any,
) -> dict[str, float]:
    """Start the run in `folder`, or resume it; return its last metrics."""
    torch.manual_seed(3)
    return run(module, data, folder, steps, callbacks, **options)
