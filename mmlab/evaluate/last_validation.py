"""Scores that a run has of itself are those of its last validation, so there has to be one."""

import lightning as L

from mmlab.config.errors import ConfigError


def refuse_no_last_validation(trainer: L.Trainer, callback: str) -> None:
    """Raise ConfigError where a run would end without a validation, and so without the score of a callback."""
    if not trainer.datamodule.val_sources or trainer.limit_val_batches == 0:  # type: ignore[attr-defined]
        raise ConfigError(f"callbacks.{callback} scores the last validation; give data.val, if only a few samples.")
    batches = trainer.val_check_interval
    # A share of an epoch, which spans the run, where no number of batches was given.
    every = batches // trainer.accumulate_grad_batches if isinstance(batches, int) else trainer.max_steps
    if trainer.max_steps % every:
        raise ConfigError(
            f"callbacks.{callback} scores the last validation, and trainer.val_every={every} has none after "
            f"{trainer.max_steps} steps; let it divide them."
        )
