"""Stages around tiny parts, and what happened while they were trained."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from mmlab.config.build import build
from mmlab.data.config import ImageTextDataConfig, Prompt
from mmlab.data.module import ShardDataModule
from mmlab.model.config import DualEncoderConfig, TextEncoderConfig
from mmlab.model.dual_encoder import DualEncoder, TextEncoder
from mmlab.stage.config import StageConfig
from mmlab.training.config import AdamWConfig
from mmlab.training.filling import fill_parts
from mmlab.training.optim import AdamW
from mmlab.training.trainable import parts_of
from tests.model import tiny
from tests.tiny_shards import sources
from tests.tiny_trainer import trainer_for

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
CAPTIONS = Prompt("v1", system="", turns="caption")
QUESTIONS = Prompt("v1", system="", turns="questions")
TOWERS = ["vision", "text", "vision_head", "text_head", "similarity"]


def optim(lr: float = 1e-2) -> AdamW:
    return AdamW(AdamWConfig(lr=lr, schedule="constant", warmup_ratio=0))


def make_stage(config: StageConfig, model: Any, lr: float = 1e-2, runs: Sequence[Path] = (), **parts: Any) -> Any:
    """A stage with a constant learning rate, filled as `build_stage` fills it."""
    stage = build(config, model=model, **{"optim": optim(lr), **parts})
    stage.on_filled(fill_parts(model, runs))
    return stage


def dual_encoder(tokenizer: Path) -> DualEncoder:
    torch.manual_seed(0)
    size = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = {"model_type": "bert", **size, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text = TextEncoder(TextEncoderConfig(init="random", architecture=fields, tokenizer=str(tokenizer)))
    return DualEncoder(DualEncoderConfig(width=16), tiny.vision(feature_layer=-1), text)


def data_of(
    stage: Any,
    paths: Sequence[Path],
    global_batch: int = 8,
    micro_batch: int = 8,
    max_length: int = 120,
    pack: bool = False,
    augment: bool = False,
) -> ShardDataModule:
    data = ImageTextDataConfig(
        train=sources(*paths),
        global_batch=global_batch,
        micro_batch=micro_batch,
        seed=0,
        max_length=max_length,
        pack=pack,
        aspect="stretch",
        augment=augment,
    )
    return ShardDataModule(data, stage.collate(data))


def first_batch(stage: Any, data: ShardDataModule) -> Any:
    """The first training batch, as the stage receives it on its device."""
    data.plan(1)
    batch = next(iter(data.train_dataloader()))
    return stage.on_before_batch_transfer(batch, 0) if "labels" in batch else batch


class Watch(L.Callback):
    """Keeps each step's loss, and looks at the modules' modes in the middle of training."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.modes: dict[str, set[bool]] = {}

    def on_train_batch_start(self, trainer, pl_module: Any, batch, batch_idx) -> None:
        for part, module in parts_of(pl_module.model).items():
            self.modes[part] = {m.training for m in module.modules() if next(m.parameters(), None) is not None}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def fit(
    stage: L.LightningModule,
    data: ShardDataModule,
    steps: int,
    devices: int = 1,
    callbacks: Sequence[L.Callback] = (),
    **options: Any,
) -> Watch:
    """Train for `steps` optimizer steps."""
    watch = Watch()
    trainer = trainer_for(data, steps, devices, callbacks=[watch, *callbacks], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(stage, data)
    return watch
