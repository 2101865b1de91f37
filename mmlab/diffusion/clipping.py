"""Bounds on the predicted clean picture while sampling: for pixels, which have bounds; latents have none."""

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError


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
