"""An exponential moving average of the weights: the model that is validated, sampled and saved as an artifact."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from mmlab.config.errors import ConfigError, RunError, nearest
from mmlab.training.config import EMAConfig
from mmlab.training.sharded_checkpoint import like
from mmlab.training.sharding import minimum_over_ranks
from mmlab.training.step_callback import StepCallback
from mmlab.training.trainable import parts_of
from mmlab.weights import all_finite, local

WARM_UP = 10


class EMA(StepCallback):
    """Averages the trained weights once per optimizer step, in float32 whatever their own dtype.

    After n steps the average moves by 1 − min(decay, (1 + n)/(10 + n)), so that it soon forgets the random start (as in
    latent diffusion and TensorFlow). It replaces the weights during validation, within `averaged(model)`, and for good
    when training has ended; otherwise the weights are their own, bit for bit. A callback that uses the model at the end
    of a validation does so within `averaged(model)`. The average is saved in every checkpoint.

    Args:
        config: settings.

    Raises:
        ConfigError: parts that are not trained.
        RunError: a checkpoint with the average of other weights, or with one that is not finite.
    """

    def __init__(self, config: EMAConfig):
        self.config = config
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] | None = None
        self._weights: dict[str, nn.Parameter] = {}
        self._aside: list[Tensor] = []
        self._depth = 0
        self._validation = ExitStack()

    @property
    def state_key(self) -> str:
        return "EMA"

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates, self._loaded = state_dict["updates"], state_dict["average"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = pl_module.model
        self._weights = self._trained(model)
        stored = self._weights if self._loaded is None else self._loaded
        self.average = average_from(stored, self._weights, trainer, "callbacks.ema")
        self._loaded, self._depth = None, 0
        _AVERAGES[model] = self

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        self.updates += 1
        decay = min(self.config.decay, (1 + self.updates) / (WARM_UP + self.updates))
        move(self.average, local_values(self._weights), 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._validation.enter_context(self.swapped())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_in()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Again, for a run that resumes after its last step and so trains nothing.
        self._put_in()

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the average in place of the weights, and the weights back afterwards; nested uses change nothing."""
        self._depth += 1
        if self._depth == 1:
            self._aside = [local(weight.detach()).clone() for weight in self._weights.values()]
            self._put_in()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for weight, own in zip(self._weights.values(), self._aside, strict=True):
                    local(weight.data).copy_(own)
                self._aside = []

    def _put_in(self) -> None:
        for name, weight in self._weights.items():
            local(weight.data).copy_(local(self.average[name]))

    def _trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        weights = learning(model)
        parts = self.config.parts
        if parts is None:
            return weights
        names = [part for part in parts_of(model) if any(name.startswith(f"{part}.") for name in weights)]
        for part in parts:
            if part not in names:
                hint = nearest(part, names) or f" Trained parts: {', '.join(names)}."
                raise ConfigError(f"callbacks.ema.parts names '{part}', which is not trained.{hint}")
        return {name: weight for name, weight in weights.items() if name.split(".")[0] in parts}


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → weight of what learns."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def average_from(
    stored: Mapping[str, Any], weights: Mapping[str, nn.Parameter], trainer: Trainer, key: str
) -> dict[str, Tensor]:
    """The average that a run goes on with, in float32, sharded as the weights are.

    Args:
        stored: the average in a checkpoint, or the weights themselves.
        weights: that are averaged, by name.
        trainer: of the run.
        key: of the callback, for messages.

    Raises:
        RunError: the average of other weights, or one that is not finite.
    """
    for name in sorted(stored.keys() | weights.keys()):
        if name not in stored or name not in weights or stored[name].shape != weights[name].shape:
            raise RunError(
                f"The checkpoint averages other weights than this run, such as {name}; start a new run, or leave out "
                f"{key}."
            )
    average = {name: like(weight, stored[name]).float() for name, weight in weights.items()}
    if not minimum_over_ranks(trainer, all_finite(list(average.values())).long()):
        raise RunError(
            f"Checkpoint {trainer.ckpt_path} has NaN or infinity in the average; remove it to resume from an earlier "
            "one."
        )
    return average


def local_values(weights: Mapping[str, nn.Parameter]) -> list[Tensor]:
    """This rank's shares of weights, in float32."""
    return [local(weight.detach()).float() for weight in weights.values()]


def move(average: Mapping[str, Tensor], towards: list[Tensor], share: float) -> None:
    """Move this rank's share of an average towards weights of the same order, by a share of the difference."""
    torch._foreach_lerp_([local(tensor) for tensor in average.values()], towards, share)  # type: ignore[attr-defined]


_AVERAGES: WeakKeyDictionary[nn.Module, EMA] = WeakKeyDictionary()


@contextmanager
def averaged(model: nn.Module) -> Iterator[None]:
    """Give the model its average weights for a while, if its run keeps an EMA; otherwise nothing changes.

    It may be nested, and afterwards the weights are their own again, bit for bit.
    """
    ema = _AVERAGES.get(model)
    if ema is None:
        yield
    else:
        with ema.swapped():
            yield
