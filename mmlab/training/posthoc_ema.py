"""Averages of the weights with power-function profiles, and their snapshots (EDM2, arXiv 2312.02696, section 3).

From the snapshots, `mmlab.training.ema_snapshots` makes the average of any width once the training is done.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from mmlab.config.errors import ConfigError, RunError
from mmlab.training.config import PostHocEMAConfig
from mmlab.training.ema import average_from, learning, local_values, move
from mmlab.training.ema_snapshots import FOLDER, drop_later, write_snapshot
from mmlab.training.lora import is_adapted
from mmlab.training.power_profile import WIDEST, exponent, share
from mmlab.training.step_callback import StepCallback
from mmlab.training.trainable import parts_of


class PostHocEMA(StepCallback):
    """Averages the trained weights with several power-function profiles, in float32, and keeps snapshots of them.

    Training, validation and the run's artifacts do not notice; `EMA` averages for these. The averages are saved in
    every checkpoint. Snapshots after the step that a run resumes from are removed, and written again; on a CPU with the
    same bits.

    Args:
        config: settings.

    Raises:
        ConfigError: widths that are not above 0 and below that of the uniform average, or the same twice; a part of
            which only an adapter is trained.
        RunError: a checkpoint without these averages, or of other weights, or with one that is not finite; a full disk.
    """

    def __init__(self, config: PostHocEMAConfig):
        self.config = config
        widths = config.widths
        if not widths or len(set(widths)) < len(widths) or not all(0 < width < WIDEST for width in widths):
            raise ConfigError(
                f"callbacks.posthoc_ema.widths={widths} must be different widths above 0 and below {WIDEST:.4g}, the "
                "width of the uniform average; such as [0.05, 0.1]."
            )
        self.updates = 0
        self.averages: dict[str, dict[str, Tensor]] = {}
        self._loaded: dict[str, Any] | None = None
        self._weights: dict[str, nn.Parameter] = {}

    @property
    def state_key(self) -> str:
        return "PostHocEMA"

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates, self._loaded = state_dict["updates"], state_dict["averages"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = pl_module.model
        if adapted := [name for name, part in parts_of(model).items() if is_adapted(part)]:
            raise ConfigError(
                f"callbacks.posthoc_ema averages whole weights, and of '{adapted[0]}' only an adapter is trained "
                "(stage.lora): set callbacks.posthoc_ema=null."
            )
        self._weights, keys = learning(model), [f"{width:g}" for width in self.config.widths]
        stored: Mapping[str, Any] = dict.fromkeys(keys, self._weights) if self._loaded is None else self._loaded
        if stored.keys() != set(keys) or (self._loaded is None and trainer.ckpt_path):
            kept = "no averages" if self._loaded is None else f"averages of widths {', '.join(stored)}"
            raise RunError(
                f"Checkpoint {trainer.ckpt_path} has {kept}, not callbacks.posthoc_ema.widths={self.config.widths}; "
                "they begin with the training: restore the setting, or start over with run.fresh=true."
            )
        where = "callbacks.posthoc_ema"
        self.averages = {key: average_from(stored[key], self._weights, trainer, where) for key in keys}
        self._loaded = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            drop_later(self._folder(trainer), self.updates)
            count = min(self.config.snapshots, trainer.max_steps)
            size = count * self._size() / 2**20
            print(f"{self._folder(trainer)}: {count} snapshots of averages, {size:,.3g} MiB in all", flush=True)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        self.updates += 1
        weights = local_values(self._weights)
        for width, average in zip(self.config.widths, self.averages.values(), strict=True):
            move(average, weights, share(self.updates, exponent(width)))
        if self._due(trainer.max_steps):
            dtype = getattr(torch, self.config.dtype)
            write_snapshot(self._folder(trainer), self.updates, self.averages, dtype, trainer.is_global_zero)

    def _due(self, end: int) -> bool:
        """Whether a snapshot follows this step: `snapshots` of them are spread evenly, and one is at the end."""
        return self.updates * self.config.snapshots // end > (self.updates - 1) * self.config.snapshots // end

    def _size(self) -> int:
        """Bytes of a snapshot."""
        values = sum(weight.numel() for weight in self._weights.values())
        return values * len(self.config.widths) * getattr(torch, self.config.dtype).itemsize

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir, FOLDER)
