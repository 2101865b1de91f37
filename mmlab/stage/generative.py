"""The base of stages that learn to generate images. Legend: B images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmlab.config.errors import ConfigError
from mmlab.data.image_condition import Conditioning
from mmlab.stage.config import StageConfig
from mmlab.stage.latents import with_seeds_on_host
from mmlab.stage.means import Means
from mmlab.stage.stage import Stage
from mmlab.training.optim import AdamW


class GenerativeStage(Stage):
    """Trains a generator and its conditioner on what frozen first stages make of images.

    The logged loss counts each sample once, whatever the micro-batches and ranks.

    Args:
        config: settings.
        model: has a `conditioner`.
        optim: builds optimizer and schedule.

    Attributes:
        learner: name of the part that generates.
        stays: names of the parts that are never trained here.

    Raises:
        ConfigError: unknown parts, or one that is never trained here.
    """

    learner: str
    stays: tuple[str, ...] = ("first_stage",)

    def __init__(self, config: StageConfig, model: nn.Module, optim: AdamW):
        for part in self.stays:
            if any(name.split(".")[0] == part for name in config.trainable):
                raise ConfigError(f"stage.trainable names '{part}', which is frozen here: stage=autoencoder trains it.")
        super().__init__(config, model, optim)
        self.train_means = Means("loss")

    def on_filled(self, artifacts: Mapping[str, Path]) -> None:
        if "conditioner" in self.frozen and "conditioner" not in artifacts and self.model.conditioner.untrained:
            raise ConfigError(
                "The conditioner has random weights and is frozen: set stage.trainable="
                f"[{self.learner}, conditioner], or name the run that trained it in stage.init_from."
            )

    def conditioning(self) -> Conditioning:
        """What is read beside an image, for the collate."""
        conditioner = self.model.conditioner
        if conditioner.reads == "class":
            return Conditioning(conditioner.names)
        if conditioner.reads == "text":
            return Conditioning(None, conditioner.tokenizer, conditioner.max_length, conditioner.vocabulary)
        return Conditioning()

    def on_before_batch_transfer(self, batch: Mapping[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return with_seeds_on_host(batch)

    def mean(self, losses_B: Tensor, **others_B: Tensor) -> Tensor:
        """Return the mean of a micro-batch's losses, and count them and other values of its samples for the log."""
        logged = {"loss": losses_B, **others_B}
        self.train_means.add({name: values.sum() for name, values in logged.items()}, len(losses_B))
        return losses_B.mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        means = self.train_means.finish(self.trainer.world_size)[0]
        self.log("train/loss", means.pop("loss"), prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in means.items()})
        super().on_before_optimizer_step(optimizer)
