"""A small and quiet Lightning trainer, and runs in a folder that are killed and resumed."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from mmlab.data.module import ShardDataModule
from mmlab.training.checkpoint import Checkpoints
from mmlab.training.checkpoint_io import FolderCheckpointIO
from mmlab.training.config import CheckpointsConfig
from mmlab.training.step_loop import StepFitLoop
from mmlab.training.trainer import fit
from tests.tiny_shards import KeyCollate


class Keys(KeyCollate):
    """Batches with the keys of their samples."""

    def batch(self, contents) -> dict[str, Any]:
        return {**super().batch(contents), "keys": [sample.key for sample in contents]}


class Kill(BaseException):
    """What SIGKILL does, as far as this process's objects are concerned."""


class KillAt(L.Callback):
    """Kills the run at the start or end of a micro-batch, in the validation after a step, or when training ends."""

    def __init__(self, hook: str, number: int):
        self.hook, self.number = hook, number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.hook == "start" and batch_idx == self.number:
            raise Kill

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self.hook == "end" and batch_idx == self.number:
            raise Kill

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if self.hook == "validation" and trainer.global_step == self.number:
            raise Kill

    def on_train_end(self, trainer, pl_module) -> None:
        if self.hook == "train end":
            raise Kill


def trainer_for(data: ShardDataModule, steps: int, devices: int = 1, **options: Any) -> L.Trainer:
    """A trainer on CPU that logs nothing and saves nothing; `val_every` counts optimizer steps."""
    val_every = options.pop("val_every", None)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": devices,
        "strategy": "ddp_fork" if devices > 1 else "auto",
        "max_epochs": -1,
        "max_steps": data.plan(steps),
        "accumulate_grad_batches": data.accumulation(devices),
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    trainer = L.Trainer(**{**settings, **options})
    StepFitLoop(trainer, val_every)
    return trainer


def run(
    stage: L.LightningModule,
    data: ShardDataModule,
    folder: Path,
    steps: int,
    callbacks: Sequence[L.Callback] = (),
    **options: Any,
) -> dict[str, float]:
    """Start the run in `folder`, or resume it; it saves every third step. Returns its last metrics."""
    saving = Checkpoints(CheckpointsConfig(folder=str(folder / "checkpoints"), every_n_steps=3))
    options |= {"callbacks": [*callbacks, saving], "plugins": [FolderCheckpointIO()], "enable_checkpointing": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(trainer_for(data, steps, **options), stage, data)
