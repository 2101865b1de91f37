"""Optimizer and schedule of the papers: AdamW, linear warm-up, cosine decay, one learning rate per part."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mmlab.config.errors import ConfigError, nearest
from mmlab.training.config import AdamWConfig
from mmlab.weights import is_sharded, local

SHARE_SEED = 1_000_003
"""Between the seeds of the shares of sharded weights: shares then repeat each other only after a million steps."""


class AdamW:
    """Builds the optimizer and its schedule for a model whose frozen parts are already frozen.

    Weights in bfloat16 (`trainer.precision=bf16-true`) are rounded stochastically, see `StochasticAdamW`.

    Args:
        config: settings.
    """

    def __init__(self, config: AdamWConfig):
        self.config = config

    def build(self, model: nn.Module, total_steps: int) -> dict[str, Any]:
        """Return Lightning's optimizer dict for `total_steps` optimizer steps.

        The number of steps is passed, not read from the trainer: reading it there makes Lightning forget the data
        position on resume.
        """
        config, groups = self.config, self._groups(model)
        options: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
        if any(parameter.dtype == torch.bfloat16 for group in groups for parameter in group["params"]):
            optimizer: torch.optim.Optimizer = StochasticAdamW(groups, **options)
        else:
            optimizer = torch.optim.AdamW(groups, **options, **_kernel([p for g in groups for p in g["params"]]))
            # The single kernel can also unscale gradients, so Lightning refuses to clip them, even without a scale.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        factors = [partial(self.factor, total_steps=total_steps, peak=group["lr"]) for group in optimizer.param_groups]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": Schedule(optimizer, factors), "interval": "step"},
        }

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        names = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        for part in self.config.part_lr:
            if part not in names:
                raise ConfigError(f"optim.part_lr names '{part}', which is not trained.{nearest(part, names)}")
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rate = self.config.part_lr.get(name.split(".")[0], self.config.lr)
                decay = self.config.weight_decay if parameter.ndim > 1 else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
        return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]

    def factor(self, step: int, total_steps: int, peak: float) -> float:
        """Share of the peak learning rate at an optimizer step (0-based)."""
        warmup = math.ceil(self.config.warmup_ratio * total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.config.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        shape = (1 + math.cos(math.pi * progress)) / 2 if self.config.schedule == "cosine" else 1 - progress
        floor = self.config.min_lr / peak
        return floor + (1 - floor) * shape


def _kernel(weights: Sequence[nn.Parameter]) -> dict[str, Any]:
    """How AdamW computes a step: the fastest way that can, by measurement.

    On a CPU one kernel reads each number once (18 ms for 33M weights on a core of an AMD EPYC, against 57 by operations
    on lists); it rounds differently, by 1e-8 of a weight. A checkpoint states the way, which a resumed run keeps.
    """
    # Operations on lists take sharded weights or whole ones, and numbers beside them.
    kinds = {is_sharded(weight) for weight in weights if weight.dim()}
    if kinds <= {False} and all(weight.device.type == "cpu" for weight in weights):
        return {"fused": True}
    return {"foreach": len(kinds) < 2}


class Schedule(LambdaLR):
    """A schedule whose rates are a function of the step and the factors alone, also right after a resume.

    The rates in a checkpoint are those of the run's end at that time; a run may be resumed with another end.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step, and set the rates that it has now; the optimizer's state must be restored before."""
        super().load_state_dict(state_dict)
        factors = zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True)
        for group, peak, factor in factors:
            group["lr"] = peak * factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def log_optimizer(module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
    """Log `train/lr` (the highest of the parts') and `train/grad_norm`, before clipping, at steps that are logged.

    Call it in `on_before_optimizer_step`, where the gradients are final.
    """
    trainer = module.trainer
    if (trainer.global_step + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
        return
    module.log("train/lr", max(group["lr"] for group in optimizer.param_groups), batch_size=1)
    module.log("train/grad_norm", total_norm(gradients_of(optimizer)), batch_size=1)


def gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The gradients that an optimizer will apply."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients as one vector; where some are sharded, all ranks call it."""
    sharded = [local(gradient) for gradient in gradients if is_sharded(gradient)]
    if not sharded:
        return torch.nn.utils.get_total_norm(gradients)
    squares = torch.stack(torch._foreach_norm(sharded, 2.0, torch.float32)).square().sum()  # type: ignore[attr-defined]
    torch.distributed.all_reduce(squares)
    whole = [gradient.float().square().sum() for gradient in gradients if not is_sharded(gradient)]
    return torch.stack([squares, *whole]).sum().sqrt()


class StochasticAdamW(torch.optim.AdamW):
    """AdamW with stochastic rounding of bfloat16 weights and moments, which are then correct on average.

    Rounded to the nearest, a bfloat16 weight of 0.02 loses every step below 4e-5 (LLaVA's are 2e-5), and a second
    moment with β₂ = 0.999 never falls: 0.1 % is less than half of its last bit. With stochastic rounding, bfloat16
    training follows float32's (arXiv 2010.06192). Each step computes in float32; float32 weights are not rounded and
    are updated as by torch's AdamW.

    The random bits depend on the number of the step alone: all ranks round alike, and so does a resumed run. Where
    weights are sharded they also depend on the share, as each rank rounds its own.

    Args:
        params, lr, betas, eps, weight_decay: as for `torch.optim.AdamW`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        generators: dict[tuple[torch.device, int], torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["step"] += 1
                count, share = int(state["step"]), _share(parameter)
                place = parameter.device, share
                if place not in generators:
                    generators[place] = torch.Generator(parameter.device).manual_seed(count + SHARE_SEED * share)
                self._update(parameter, state, group, count, generators[place])
        return loss

    def _update(
        self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], count: int, chance: torch.Generator
    ) -> None:
        assert parameter.grad is not None
        (beta1, beta2), lr = group["betas"], group["lr"]
        gradient, own = local(parameter.grad).float(), local(parameter)
        average, squares = local(state["exp_avg"]), local(state["exp_avg_sq"])
        mean = average.float().lerp(gradient, 1 - beta1)
        square = squares.float().mul(beta2).addcmul(gradient, gradient, value=1 - beta2)
        scale = square.div(1 - beta2**count).sqrt_().add_(group["eps"])
        weight = own.float().mul(1 - lr * group["weight_decay"])
        weight = weight.addcdiv(mean, scale, value=-lr / (1 - beta1**count))
        for place, exact in ((average, mean), (squares, square), (own, weight)):
            place.copy_(stochastically_rounded(exact, chance) if place.dtype == torch.bfloat16 else exact)


def _share(parameter: Tensor) -> int:
    """0 for a whole parameter; of a sharded one, this rank's share, counted from 1."""
    return 1 + parameter.device_mesh.get_local_rank() if is_sharded(parameter) else 0  # type: ignore[attr-defined]


def stochastically_rounded(exact: Tensor, chance: torch.Generator) -> Tensor:
    """Round a float32 tensor to bfloat16: up or down, with the probabilities that make the mean exact.

    Args:
        exact: float32, finite or not.
        chance: source of the random bits, on the same device.
    """
    # bfloat16 is the upper half of float32: what is added to the lower half carries over as often as it should.
    bits = exact.view(torch.int32)
    random = torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=chance)
    carried = bits.add(random).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(exact.isfinite(), carried, exact).bfloat16()
