"""An exponential moving average of the weights: the model that is validated, shown and left as an artifact."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from mmlab.config.errors import ConfigError, RunError, nearest
from mmlab.training.trainable import parts_of

WARM_UP = 10


class EMA(Callback):
    """Averages the weights that learn, once per optimizer step, in float32 whatever their own dtype.

    After n steps the average moves by 1 − min(decay, (1 + n)/(10 + n)), so that it forgets the random start soon
    (as latent diffusion's and TensorFlow's averages do). It stands in for the weights during validation, and for good
    when training has ended; in between the weights are their own, bit for bit. It is part of every checkpoint, and a
    run that goes on has the same average.

    List it behind callbacks that look at the model at the end of a validation: they then see the average.

    Args:
        decay: share of the old average at each step (DDPM, latent diffusion and DiT: 0.9999).
        parts: names of the parts to average; None: all that learn.

    Raises:
        ConfigError: a decay out of 0 … 1, parts that do not learn, or a strategy that shards the weights.
        RunError: a checkpoint with the average of other weights.
    """

    def __init__(self, decay: float = 0.9999, parts: Sequence[str] | None = None):
        if not 0 <= decay < 1:
            raise ConfigError(f"callbacks.ema.decay={decay:g} must lie in 0 … 1; 0.9999 is usual.")
        self.decay = decay
        self.parts = None if parts is None else list(parts)
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] | None = None
        self._weights: dict[str, nn.Parameter] = {}
        self._aside: list[Tensor] | None = None
        self._step = 0

    @property
    def state_key(self) -> str:
        return "EMA"

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates, self._loaded = state_dict["updates"], state_dict["average"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.strategy.restore_checkpoint_after_setup:
            name = type(trainer.strategy).__name__
            raise ConfigError(f"callbacks.ema averages whole weights, which {name} shards; use trainer.strategy=ddp.")
        model: Any = pl_module.model
        self._weights = self._learning(model)
        # Older checkpoints average unused weights too, which do not learn.
        still = {name for name, weight in model.named_parameters() if not weight.requires_grad}
        loaded = self._weights if self._loaded is None else self._loaded
        stored = {name: weight for name, weight in loaded.items() if name not in still}
        if fault := _unlike(stored, self._weights):
            raise RunError(
                f"the checkpoint averages other weights than this run, such as {fault}: start a new run, or leave out"
                " callbacks.ema."
            )
        self.average = {
            name: stored[name].detach().to(weight.device, torch.float32, copy=True)
            for name, weight in self._weights.items()
        }
        self._loaded, self._aside = None, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # within accumulation
        self._step = trainer.global_step
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (WARM_UP + self.updates))
        weights = [weight.detach().float() for weight in self._weights.values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)  # type: ignore[attr-defined]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._aside = [weight.detach().clone() for weight in self._weights.values()]
            self._put_in()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._aside is not None:
            for weight, own in zip(self._weights.values(), self._aside, strict=True):
                weight.data.copy_(own)
            self._aside = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_in()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Again, for a run that goes on after its last step and so trains nothing.
        self._put_in()

    def _put_in(self) -> None:
        for name, weight in self._weights.items():
            weight.data.copy_(self.average[name])

    def _learning(self, model: nn.Module) -> dict[str, nn.Parameter]:
        learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if self.parts is None:
            return learning
        names = [part for part in parts_of(model) if any(name.startswith(f"{part}.") for name in learning)]
        for part in self.parts:
            if part not in names:
                hint = nearest(part, names) or f" It is one of {', '.join(names)}."
                raise ConfigError(f"callbacks.ema.parts names '{part}', which does not learn.{hint}")
        return {name: weight for name, weight in learning.items() if name.split(".")[0] in self.parts}


def _unlike(stored: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str | None:
    """The first name that only one of them has, or whose shapes differ."""
    for name in sorted(stored.keys() | weights.keys()):
        if name not in stored or name not in weights or stored[name].shape != weights[name].shape:
            return name
    return None
