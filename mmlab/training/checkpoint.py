"""When a run saves, and what makes a resumed run identical to an uninterrupted one."""

import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from mmlab.config.errors import RunError
from mmlab.training import rng
from mmlab.training.checkpoint_folder import PREFIX, newest_whole, prune, remove_drafts
from mmlab.training.config import CheckpointsConfig
from mmlab.training.preemption import Preempted, Signals, requeue
from mmlab.training.step_callback import StepCallback


class Checkpoints(StepCallback, Checkpoint):
    """Saves the whole state of a run every few optimizer steps, before validation, and before it is preempted.

    A checkpoint holds the parts that learn, optimizer, schedule, loss scale, data position, the state of other
    callbacks and the random state of every rank. Every validation draws the same random numbers and none of
    training's, and an interrupted one is repeated: a resumed run equals an uninterrupted one, bit for bit.

    After SIGUSR1, SIGUSR2, SIGTERM or Ctrl-C the current optimizer step ends, the run saves and exits (see
    `Preempted`); the first two also requeue a SLURM job. If a step and a save take longer than `grace_s`, the first
    save prints a warning.

    Args:
        config: settings.
    """

    def __init__(self, config: CheckpointsConfig):
        self.config = config
        self.folder = Path(config.folder)
        self.signals = Signals()
        self.metrics: dict[str, float] = {}  # the last ones, which a run killed after its last step would lose
        self._rng: list[dict[str, Any]] | None = None
        self._rng_outside: dict[str, Any] | None = None
        self._warned = False

    @property
    def state_key(self) -> str:
        return "Checkpoints"

    def newest(self, hashes: bool = True) -> Path | None:
        """The checkpoint to resume from, None without any; prints a warning for each damaged one that it skips.

        Args:
            hashes: whether files are read and hashed.

        Raises:
            RunError: there are checkpoints, and all are damaged.
        """
        return newest_whole(self.folder, lambda fault: print(f"WARNING: {fault}", file=sys.stderr, flush=True), hashes)

    # What a checkpoint holds beside Lightning's own

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.metrics = state_dict["metrics"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = rng.gather(rng.get_state())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._rng = checkpoint["rng"]

    # Resuming

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._seed = torch.initial_seed()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            remove_drafts(self.folder)
        self._started_at = self._saved = trainer.global_step
        self._step_began = time.monotonic()
        self._fresh = True
        self.signals.listen()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._fresh:
            return
        # Not earlier: other callbacks may draw random numbers when training starts.
        self._fresh = False
        if self._rng is not None and len(self._rng) == trainer.world_size:
            rng.set_state(self._rng[trainer.global_rank])
        else:  # a first start, or another number of ranks: each rank draws its own numbers
            rng.seed(self._seed + 1_000_003 * trainer.global_step + trainer.global_rank)
        self._rng = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Each validation draws the same numbers, and none of those that training will draw.
        self._rng_outside = rng.get_state()
        rng.seed(self._seed + trainer.global_rank)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._rng_outside is not None:
            rng.set_state(self._rng_outside)

    # Saving and exiting

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        if number := self.signals.agreed():
            self._leave(trainer, number)
        last = trainer.global_step >= trainer.max_steps
        loop: Any = trainer.fit_loop.epoch_loop
        if trainer.global_step % self.config.every_n_steps == 0 or loop.validation_due or last:
            self._save(trainer)
            if trainer.is_global_zero:
                prune(self.folder, self.config.keep)
        self._step_began = time.monotonic()

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit" and (number := self.signals.agreed()):
            self._leave(trainer, number)  # the step was saved before its validation

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signals.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.signals.restore()

    def _save(self, trainer: Trainer) -> None:
        if self._saved == trainer.global_step:
            return
        began = time.monotonic()
        # Lightning may log a step only after it is saved; a run that exits in between would never log it.
        trainer._logger_connector.update_train_step_metrics()
        self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        trainer.save_checkpoint(self.folder / f"{PREFIX}{trainer.global_step}")
        self._saved = trainer.global_step
        needed = time.monotonic() - self._step_began
        if needed > self.config.grace_s and not self._warned and trainer.is_global_zero:
            self._warned = True
            print(
                f"WARNING: a step and a save take {needed:.0f} s ({time.monotonic() - began:.0f} s of it the save), "
                f"longer than callbacks.checkpoint.grace_s={self.config.grace_s:g}: a preempted run may be killed "
                "before it has saved; ask the cluster for a longer grace time and set it here.",
                file=sys.stderr,
            )

    def _leave(self, trainer: Trainer, number: int) -> None:
        began = time.monotonic()
        self._save(trainer)
        name = signal.Signals(number).name
        step = f"step {trainer.global_step} of {trainer.max_steps}"
        if fault := getattr(trainer.strategy.checkpoint_io, "fault", None):
            raise RunError(f"stopped by {name} after {step}, which is not saved: {fault}")
        message = f"stopped by {name}: {step} is saved ({time.monotonic() - began:.1f} s)"
        if trainer.global_step == self._started_at:
            # A job that never finishes a step would be requeued forever.
            why = "no step was made since the start, so the job is not requeued"
            raise Preempted(f"{message}; {why}" if trainer.is_global_zero else "", number)
        if owner := self.signals.owner(number):
            print(f"mmlab: {message}", file=sys.stderr, flush=True)
            owner(number, None)
        raise Preempted(f"{message}; {requeue(number)}" if trainer.is_global_zero else "", number)
