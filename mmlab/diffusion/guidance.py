"""Classifier-free guidance (arXiv 2207.12598) of a conditional denoiser, and clipping of its predictions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.diffusion.config import ClipConfig, GuidanceConfig


class Guidance:
    """Classifier-free guidance for any model and condition.

    Args:
        config: settings.

    Raises:
        ConfigError: an interval that is not a lowest and a highest time.
    """

    def __init__(self, config: GuidanceConfig):
        self.scale, self.interval, self.rescale = config.scale, config.interval, config.rescale
        if self.interval is not None and not (len(self.interval) == 2 and self.interval[0] <= self.interval[1]):
            raise ConfigError(f"interval={list(self.interval)} must be two times, the lowest and the highest.")

    def __call__(
        self, model: Callable[[Tensor, Tensor, Any], Tensor], condition: Any, null: Any
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The guided denoiser (x_t, time) → prediction, for a sampler.

        Args:
            model: (x_t `[B, …]`, time `[B]`, condition) → prediction.
            condition: tensor of B rows, or a dict, list or tuple of them (None stays None).
            null: the condition that replaced dropped ones in training, in the same form.
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
        """The guided prediction, in float32 or more: two bfloat16 outputs differ mostly by rounding."""
        dtype = torch.promote_types(conditional.dtype, torch.float32)
        conditional, null = conditional.to(dtype), null.to(dtype)
        mixed = null + self.scale * (conditional - null)
        if not self.rescale:
            return mixed
        ratio = conditional.flatten(1).std(1) / mixed.flatten(1).std(1)
        rescaled = mixed * ratio.view(-1, *[1] * (mixed.dim() - 1))
        return self.rescale * rescaled + (1 - self.rescale) * mixed


def _joined(condition: Any, null: Any) -> Any:
    """The rows of a condition, followed by those of the null condition."""
    if isinstance(condition, Tensor):
        return torch.cat([condition, null])
    if isinstance(condition, dict):
        return {name: _joined(part, null[name]) for name, part in condition.items()}
    if isinstance(condition, list | tuple):
        return type(condition)(_joined(*parts) for parts in zip(condition, null, strict=True))
    return condition


class Clip:
    """Keeps x_0 within ±limit: static clipping, or dynamic thresholding (Imagen, arXiv 2205.11487) with a percentile.

    The latter clamps each sample to that quantile of its own |x_0|, and divides by it, where it exceeds the limit.

    Args:
        config: settings.
    """

    def __init__(self, config: ClipConfig):
        self.limit, self.percentile = config.limit, config.percentile

    def __call__(self, x_0: Tensor) -> Tensor:
        if self.percentile is None:
            return x_0.clamp(-self.limit, self.limit)
        bound = torch.quantile(x_0.flatten(1).abs(), self.percentile, dim=1).clamp(min=self.limit)
        bound = bound.view(-1, *[1] * (x_0.dim() - 1))
        return x_0.clamp(-bound, bound) * (self.limit / bound)
