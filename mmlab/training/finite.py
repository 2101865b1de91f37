"""Ends a run whose loss, gradients or weights are no longer finite, before anything of it is saved or scored."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from mmlab.config.errors import RunError
from mmlab.training.sharding import minimum_over_ranks
from mmlab.training.step_callback import StepCallback
from mmlab.weights import all_finite, values_of

NEVER = torch.iinfo(torch.int64).max
"""In place of the first step at which something was not finite, if it always was."""
LEAST_HALF = 2.0**-25
"""Numbers below it are 0 in float16."""


class FiniteGuard(StepCallback):
    """Raises RunError that names the first step with NaN or infinity in the loss, a part's gradient or its weights.

    Each step notes on the device what was not finite. On a GPU the note is read where metrics are logged, before each
    checkpoint and validation, and at the end: other steps do not synchronize, and nothing that is not finite is saved,
    sampled or scored. A step reads gradients and weights once more, a tenth of what AdamW moves. With a loss scale
    (`trainer.precision=16-mixed`) gradients are not checked: the scaler skips such a step.

    A validation loss that is not finite ends the run, too. Other metrics may be NaN, such as a share of nothing.
    """

    def __init__(self) -> None:
        self._first = torch.zeros(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        model: Any = getattr(pl_module, "model", pl_module)
        self._parts: dict[str, nn.Module] = {
            name: part for name, part in model.named_children() if any(p.requires_grad for p in part.parameters())
        }
        self._buffers = {name: values_of(part).keys() for name, part in self._parts.items()}
        self._places = ["loss", *(f"gradient of {name}" for name in self._parts)]
        self._places += [f"weights of {name}" for name in self._parts]
        device = pl_module.device
        self._loss = torch.zeros((), device=device)  # NaN after a micro-batch whose loss is not finite
        self._gradients = [torch.tensor(True, device=device)] * len(self._parts)
        self._first = torch.zeros(len(self._places), dtype=torch.int64, device=device)  # 0: always finite
        finite = minimum_over_ranks(trainer, torch.stack([self._first.new_ones(()), *self._weights_finite(device)]))
        for name, healthy in zip(self._parts, finite[1:].tolist(), strict=True):
            if not healthy:
                if trainer.ckpt_path is None:
                    raise RunError(f"The run would start with NaN or infinity in the weights of {name}.")
                raise RunError(
                    f"Checkpoint {trainer.ckpt_path} has NaN or infinity in the weights of {name}; remove it to resume "
                    "from an earlier one."
                )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.scaler is None:
            gradients = [[p.grad for p in part.parameters() if p.grad is not None] for part in self._parts.values()]
            self._gradients = [all_finite(part).to(pl_module.device) for part in gradients]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._loss = self._loss + 0 * loss.detach().float().sum()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        finite = torch.stack([self._loss.isfinite(), *self._gradients, *self._weights_finite(pl_module.device)])
        self._first = torch.where((self._first == 0) & ~finite, trainer.global_step, self._first)
        logged = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if logged or pl_module.device.type == "cpu":
            self.check(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/") and name.endswith(("/loss", "_loss")) and not torch.as_tensor(value).isfinite():
                raise RunError(
                    f"{name} is {float(value)} at step {trainer.global_step}, though the training loss is finite: "
                    f"{_advice(trainer)}."
                )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.check(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Read what was noted; raises RunError if something was not finite."""
        first = minimum_over_ranks(trainer, torch.where(self._first == 0, NEVER, self._first)).tolist()
        noted = [(step, place) for step, place in zip(first, self._places, strict=True) if step < NEVER]
        if not noted:
            return
        step = min(step for step, _ in noted)
        places = [place for first, place in noted if first == step]
        kind = places[0].split(" ")[0]
        what = " and ".join(place for place in places if place.startswith(kind))
        raise RunError(
            f"The {what} {'have' if kind == 'weights' else 'has'} NaN or infinity at step {step}: {_advice(trainer)}; "
            "earlier checkpoints are unchanged."
        )

    def _weights_finite(self, device: torch.device) -> list[Tensor]:
        """For each trained part, whether its trained weights and its buffers (codebooks, statistics) are finite."""
        return [
            all_finite(
                [
                    *(weight for weight in part.parameters() if weight.requires_grad),
                    *(value for key, value in part.named_buffers() if key in self._buffers[name]),
                ]
            ).to(device)
            for name, part in self._parts.items()
        ]


def _advice(trainer: Trainer) -> str:
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    eps = min((group.get("eps", 1.0) for group in groups), default=1.0)
    if trainer.precision == "16-true" and eps < LEAST_HALF:
        return f"in float16 optim.eps={eps:g} is 0, so set optim.eps=1e-4, or train with trainer.precision=bf16-mixed"
    rate = max((group.get("initial_lr", group["lr"]) for group in groups), default=0.0)
    steps = [f"lower optim.lr (the peak rate is {rate:.3g})", "raise optim.warmup_ratio"]
    if trainer.gradient_clip_val is None:
        steps.append("set trainer.gradient_clip_val=1")
    if str(trainer.precision).startswith("16"):
        steps.append("train with trainer.precision=bf16-mixed")
    return f"{', '.join(steps[:-1])}, or {steps[-1]}"
