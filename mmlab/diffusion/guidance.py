"""Classifier-free guidance (arXiv 2207.12598) around a conditional denoiser."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError


class Guidance:
    """Settings of classifier-free guidance, for any model and condition.

    Args:
        scale: w in null + w·(conditional − null): 1 is the conditional model, 0 the unconditional one.
        interval: lowest and highest model time within which to guide (arXiv 2404.07724); the conditional model alone
            answers elsewhere. None guides everywhere.
        rescale: φ of arXiv 2305.08891: share of the guided output that is scaled back to the conditional output's
            standard deviation per sample, against over-exposure at high scales.

    Raises:
        ConfigError: a negative scale, an empty interval, or φ out of 0 … 1.
    """

    def __init__(self, scale: float = 1.0, interval: tuple[float, float] | None = None, rescale: float = 0.0):
        if scale < 0:
            raise ConfigError(f"scale={scale:g} must be at least 0; 1 is the conditional model unguided.")
        if interval is not None and not (len(interval) == 2 and interval[0] <= interval[1]):
            raise ConfigError(f"interval={list(interval)} must be two times, the lowest and the highest.")
        if not 0 <= rescale <= 1:
            raise ConfigError(f"rescale={rescale:g} must lie in 0 … 1.")
        self.scale, self.interval, self.rescale = scale, interval, rescale

    def __call__(
        self, model: Callable[[Tensor, Tensor, Any], Tensor], condition: Any, null: Any
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The guided denoiser (x_t, time) → prediction, for a sampler.

        Args:
            model: (x_t `[B, …]`, time `[B]`, condition) → prediction.
            condition: tensor of B rows, or a dict, list or tuple of them (None stays None).
            null: what the model was shown in place of a dropped condition, in the same form.
        """

        def guided(x: Tensor, t: Tensor) -> Tensor:
            if self.scale == 1:
                return model(x, t, condition)
            inside = self._inside(t)
            if not inside.any():
                return model(x, t, condition)
            if self.scale == 0 and inside.all():
                return model(x, t, null)
            both = _joined(condition, null)
            with_condition, without = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
            mixed = self._mixed(with_condition, without)
            rows = inside.view(-1, *[1] * (mixed.dim() - 1))
            return torch.where(rows, mixed, with_condition.to(mixed.dtype))

        return guided

    def _inside(self, t: Tensor) -> Tensor:
        if self.interval is None:
            return torch.ones_like(t, dtype=torch.bool)
        return (t >= self.interval[0]) & (t <= self.interval[1])

    def _mixed(self, conditional: Tensor, null: Tensor) -> Tensor:
        """The guided prediction, in float32 or more: the difference of two bfloat16 answers would be scaled noise."""
        dtype = torch.promote_types(conditional.dtype, torch.float32)
        conditional, null = conditional.to(dtype), null.to(dtype)
        mixed = null + self.scale * (conditional - null)
        if not self.rescale:
            return mixed
        ratio = conditional.flatten(1).std(1) / mixed.flatten(1).std(1)
        rescaled = mixed * ratio.view(-1, *[1] * (mixed.dim() - 1))
        return self.rescale * rescaled + (1 - self.rescale) * mixed


def _joined(condition: Any, null: Any) -> Any:
    """A condition's rows above the null's."""
    if isinstance(condition, Tensor):
        return torch.cat([condition, null])
    if isinstance(condition, dict):
        return {name: _joined(part, null[name]) for name, part in condition.items()}
    if isinstance(condition, list | tuple):
        return type(condition)(_joined(*parts) for parts in zip(condition, null, strict=True))
    return condition


class Clip:
    """Keeps x_0 within ±limit.

    Args:
        limit: of the data's values.
        percentile: None clamps (static). A number in (0, 1) is dynamic thresholding (Imagen, arXiv 2205.11487): each
            sample is clamped to this quantile of its own |x_0| and divided by it, where that exceeds the limit.

    Raises:
        ConfigError: a limit not above 0, or a percentile out of (0, 1).
    """

    def __init__(self, limit: float = 1.0, percentile: float | None = None):
        if limit <= 0 or (percentile is not None and not 0 < percentile < 1):
            raise ConfigError(f"clip needs limit > 0 and percentile within 0 … 1, not {limit} and {percentile}.")
        self.limit, self.percentile = limit, percentile

    def __call__(self, x_0: Tensor) -> Tensor:
        if self.percentile is None:
            return x_0.clamp(-self.limit, self.limit)
        bound = torch.quantile(x_0.flatten(1).abs(), self.percentile, dim=1).clamp(min=self.limit)
        bound = bound.view(-1, *[1] * (x_0.dim() - 1))
        return x_0.clamp(-bound, bound) * (self.limit / bound)
