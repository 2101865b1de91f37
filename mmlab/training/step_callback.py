"""Base of callbacks that act once per optimizer step, whatever the gradient accumulation."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class StepCallback(Callback):
    """Calls `on_step_end` after the last micro-batch of each optimizer step."""

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        """Act on a finished step; `trainer.global_step` counts it already."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.on_step_end(trainer, pl_module, batch_idx)
