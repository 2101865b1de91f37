"""Adversarial autoencoders of 16-pixel pictures, and their training with checkpoints."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from mmlab.data.module import ShardDataModule
from mmlab.model.autoencoder import AutoencoderModel
from mmlab.model.config import PatchDiscriminatorConfig
from mmlab.model.discriminator import PatchDiscriminator
from mmlab.model.perceptual import StandIn
from mmlab.stage.autoencoder import AutoencoderTraining
from mmlab.training.checkpoint import Checkpoints
from mmlab.training.checkpoint_io import FolderCheckpointIO
from mmlab.training.optim import AdamW
from mmlab.training.trainer import fit
from tests.model import tiny_autoencoders as tiny

PARTS = ["first_stage", "discriminator"]


def model(kind: str = "kl", **codebook: Any) -> AutoencoderModel:
    """Random weights, the same each time."""
    first_stage = tiny.kl() if kind == "kl" else tiny.vq(**codebook)
    return AutoencoderModel(first_stage, PatchDiscriminator(PatchDiscriminatorConfig(layers=2, width=8)), StandIn())


def stage(kind: str = "kl", lr: float = 2e-3, **options: Any) -> AutoencoderTraining:
    codebook = options.pop("codebook", {})
    given = {"adversarial_start": 0, **options}
    optim = AdamW(lr, schedule="constant", warmup_ratio=0, betas=(0.5, 0.9))
    return AutoencoderTraining(model(kind, **codebook), optim, PARTS, **given)


def data_of(
    module: AutoencoderTraining, root: Path, val: bool = True, global_batch: int = 8, micro_batch: int = 8
) -> ShardDataModule:
    collate = module.collate(size=16, aspect="stretch", flip=True, latents=False)
    held_out = [{"path": str(root / "val")}] if val else []
    return ShardDataModule(
        [{"path": str(root / "train")}], held_out, global_batch=global_batch, micro_batch=micro_batch, collate=collate
    )


def train(
    module: L.LightningModule,
    data: ShardDataModule,
    folder: Path,
    steps: int,
    callbacks: Sequence[L.Callback] = (),
    **options: Any,
) -> dict[str, float]:
    """Start the run in `folder` or go on with it; return its last metrics."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            max_steps=data.plan(steps),
            accumulate_grad_batches=data.accumulation(1),
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[*callbacks, Checkpoints(str(folder / "checkpoints"), every_n_steps=3)],
            plugins=[FolderCheckpointIO()],
            **options,
        )
        return fit(trainer, module, data)
