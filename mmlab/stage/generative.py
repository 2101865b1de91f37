"""What stages that learn to make pictures share. Legend: B pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmlab.config.errors import ConfigError, RunError
from mmlab.data.image_condition import Conditioning
from mmlab.stage.latents import with_seeds_on_host
from mmlab.stage.stage import Stage
from mmlab.stage.token_loss import TokenMean
from mmlab.training.artifacts import fill_parts
from mmlab.training.optim import AdamW, log_optimizer


class GenerativeStage(Stage):
    """Trains a part that makes pictures, and its conditioner, on what frozen first stages say of pictures.

    The logged loss counts each sample once, whatever the micro-batches and ranks.

    Args:
        model: has a `conditioner`.
        optim: builds optimizer and schedule.
        trainable: names of the parts that learn.
        init_from: run folders whose artifacts fill the parts first.

    Attributes:
        learner: name of the part that makes pictures.
        stays: names of parts that never learn here.
        loaded: the folder that each part came from.

    Raises:
        ConfigError: unknown parts, one that stays, a conditioner that would stay random, or artifacts that do not fit.
    """

    learner: str
    stays: tuple[str, ...] = ("first_stage",)

    def __init__(self, model: nn.Module, optim: AdamW, trainable: Sequence[str], init_from: Sequence[str]):
        for part in self.stays:
            if any(name.split(".")[0] == part for name in trainable):
                raise ConfigError(
                    f"stage.trainable names '{part}', which stays as it is here: stage=autoencoder trains it."
                )
        super().__init__(model, optim, trainable)
        self.loaded = fill_parts(model, [Path(run) for run in init_from])
        conditioner: Any = model.conditioner
        if "conditioner" in self.frozen and "conditioner" not in self.loaded and conditioner.unlearnt:
            raise ConfigError(
                "The conditioner's weights are random, and would stay so: give stage.trainable="
                f"[{self.learner}, conditioner], or name the run that trained it in stage.init_from."
            )
        # A mean over samples here: "tokens" are samples.
        self.train_mean = TokenMean()

    def conditioning(self) -> Conditioning:
        """What is read beside a picture, for the collate."""
        conditioner = self.model.conditioner
        if conditioner.reads == "class":
            return Conditioning(conditioner.names)
        if conditioner.reads == "text":
            return Conditioning(None, conditioner.tokenizer, conditioner.max_length)
        return Conditioning()

    def on_before_batch_transfer(self, batch: Mapping[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return with_seeds_on_host(batch)

    def mean(self, losses_B: Tensor) -> Tensor:
        """The mean of a micro-batch's losses, which are counted for the log."""
        self.train_mean.add(losses_B.sum(), len(losses_B))
        return losses_B.mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        mean, _ = self.train_mean.finish(self.trainer.world_size)
        self.log("train/loss", mean, prog_bar=True)
        log_optimizer(self, optimizer)
        # Looked at only where it is logged anyway: it makes the device wait.
        step = self.trainer.global_step + 1
        if step % self.trainer.log_every_n_steps == 0 and not mean.isfinite():  # type: ignore[attr-defined]
            raise RunError(
                f"The loss is {float(mean)} at step {step}: lower optim.lr, or set trainer.gradient_clip_val."
            )
