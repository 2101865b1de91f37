"""Optimiser and schedule of the papers: AdamW, linear warm-up, cosine decay, one learning rate per part."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mmlab.config.errors import ConfigError, nearest
from mmlab.training.stochastic_rounding import StochasticAdamW


class AdamW:
    """Builds the optimizer and its schedule for a model whose frozen parts are already frozen.

    Weights in bfloat16 (`trainer.precision=bf16-true`) are rounded stochastically, see `StochasticAdamW`.

    Args:
        lr: peak learning rate.
        weight_decay: on matrices only; biases, norms and embeddings of one dimension have none.
        betas, eps: as in torch.
        schedule: `cosine`, `linear` (both down to `min_lr`) or `constant`, after the warm-up.
        warmup_ratio: share of all optimizer steps spent warming up (LLaVA: 0.03).
        min_lr: learning rate at the last step.
        part_lr: peak learning rate of single parts, such as `{connector: 2e-5}`.
    """

    SCHEDULES = ("cosine", "linear", "constant")

    def __init__(
        self,
        lr: float,
        weight_decay: float = 0.0,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        schedule: str = "cosine",
        warmup_ratio: float = 0.03,
        min_lr: float = 0.0,
        part_lr: dict[str, float] | None = None,
    ):
        if schedule not in self.SCHEDULES:
            raise ConfigError(f"optim.schedule={schedule} is unknown.{nearest(schedule, self.SCHEDULES)}")
        self.lr = lr
        self.weight_decay = weight_decay
        self.betas = (betas[0], betas[1])
        self.eps = eps
        self.schedule = schedule
        self.warmup_ratio = warmup_ratio
        self.min_lr = min_lr
        self.part_lr = dict(part_lr or {})

    def build(self, model: nn.Module, total_steps: int) -> dict[str, Any]:
        """Return Lightning's optimizer dict for `total_steps` optimizer steps.

        The number of steps is given, not read from the trainer: reading it there makes Lightning forget
        the data position on resume.
        """
        groups, options = self._groups(model), {"lr": self.lr, "betas": self.betas, "eps": self.eps}
        if any(parameter.dtype == torch.bfloat16 for group in groups for parameter in group["params"]):
            optimizer: torch.optim.Optimizer = StochasticAdamW(groups, **options)
        else:
            optimizer = torch.optim.AdamW(groups, **options, foreach=True)
        factors = [partial(self.factor, total_steps=total_steps, peak=group["lr"]) for group in optimizer.param_groups]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factors), "interval": "step"},
        }

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        names = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        for part in self.part_lr:
            if part not in names:
                raise ConfigError(f"optim.part_lr names '{part}', which does not learn.{nearest(part, names)}")
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rate = self.part_lr.get(name.split(".")[0], self.lr)
                decay = self.weight_decay if parameter.ndim > 1 else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
        return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]

    def factor(self, step: int, total_steps: int, peak: float) -> float:
        """Share of the peak learning rate at an optimizer step (0-based)."""
        warmup = math.ceil(self.warmup_ratio * total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        shape = (1 + math.cos(math.pi * progress)) / 2 if self.schedule == "cosine" else 1 - progress
        floor = self.min_lr / peak
        return floor + (1 - floor) * shape


def log_optimizer(module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
    """Log `train/lr` (the highest of the parts') and `train/grad_norm`, before clipping, at steps that are logged.

    Call it in `on_before_optimizer_step`, where the gradients are final.
    """
    trainer = module.trainer
    if (trainer.global_step + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
        return
    groups = optimizer.param_groups
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    module.log("train/lr", max(group["lr"] for group in groups), batch_size=1)
    module.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients), batch_size=1)
