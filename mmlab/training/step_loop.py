"""Lightning's training loop, where validations depend on the number of the optimizer step alone."""

from typing import Any

from lightning import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class StepFitLoop(_FitLoop):
    """Validates after every `val_every`-th optimizer step and after the last one, in every run with the same end.

    It does not matter how often the run was resumed, on how many ranks, or which end it had before. A checkpoint is
    saved before the validation of its step, so a resumed run begins with that validation.

    Args:
        trainer: its loop is replaced by this one.
        val_every: optimizer steps between validations; None: only after the last step.

    Attributes:
        began_at: optimizer steps before this start.
    """

    epoch_loop: "StepEpochLoop"

    def __init__(self, trainer: Trainer, val_every: int | None):
        super().__init__(trainer, trainer.min_epochs, trainer.max_epochs)
        self.epoch_loop = StepEpochLoop(trainer, trainer.min_steps, trainer.max_steps)
        self.epoch_loop.val_every = val_every
        self.began_at = 0
        trainer.fit_loop = self

    @property
    def skip(self) -> bool:
        """Whether there is nothing to train on; a run that was killed after its last step still has to end."""
        return self.max_batches == 0 or self.trainer.limit_train_batches == 0

    def on_run_start(self) -> None:
        self.began_at = self.epoch_loop.judged = self.epoch_loop.global_step
        super().on_run_start()
        if self.began_at and self.epoch_loop.validation_due:
            self.trainer.validating = True
            self.epoch_loop.val_loop.run()
            self.trainer.training = True


class StepEpochLoop(_TrainingEpochLoop):
    """The loop over the batches of `StepFitLoop`."""

    val_every: int | None = None
    judged = 0  # the last step for which `_should_check_val_fx` was asked

    @property
    def validation_due(self) -> bool:
        """Whether the validation of the last finished step is due."""
        step, every = self.global_step, self.val_every
        scheduled = step >= self.max_steps or (every is not None and step % every == 0)
        return scheduled and bool(self.trainer.enable_validation)

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        stepped, self.judged = self.global_step != self.judged, self.global_step
        stopping = self.trainer.should_stop and self.trainer.fit_loop._can_stop_early and self.trainer.enable_validation
        return stepped and (self.validation_due or stopping)

    def update_restart_stage(self) -> None:
        super().update_restart_stage()
        # A checkpoint at the end of a run holds that its batch was the last one, which a later end changes.
        batches = self.batch_progress
        batches.is_last_batch = batches.is_last_batch and batches.current.ready >= self.trainer.num_training_batches

    def state_dict(self, destination: dict | None = None, prefix: str = "") -> dict:
        """Without the progress of the last validation: a checkpoint is never saved within one."""
        state = super().state_dict(destination, prefix)
        for key in [key for key in state if key.startswith(f"{prefix}val_loop.")]:
            del state[key]
        return state
