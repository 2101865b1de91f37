"""Flow matching (rectified flow, arXiv 2209.03003): images and noise are joined by straight lines."""

from typing import Any

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.diffusion.config import FlowMatchingConfig, SamplerConfig
from mmlab.diffusion.process import Level, NoiseProcess


class FlowMatching(NoiseProcess):
    """x_t = (1−t)·x_0 + t·ε with times in (0, 1]; the velocity v = ε − x_0 does not depend on t.

    Args:
        config: settings.

    Raises:
        ConfigError: a mean or deviation of logits for uniform times.
    """

    def __init__(self, config: FlowMatchingConfig):
        if config.density != "logit_normal" and (config.logit_mean, config.logit_std) != (0, 1):
            raise ConfigError(
                "process.logit_mean and process.logit_std apply only to process.density=logit_normal; set it, or leave "
                "them out."
            )
        self.config, self.target = config, config.target

    def level(self, t: Tensor) -> Level:
        exact = t if t.device.type == "mps" else t.double()  # mps has no float64
        return Level(t, 1 - exact, exact)

    def grid(self, steps: int, spacing: str = SamplerConfig.spacing) -> list[Level]:
        """`steps` times from 1 in equal steps of the time before its shift.

        Raises:
            ConfigError: no steps, or a spacing other than `trailing`: the flow starts at t = 1.
        """
        if spacing != "trailing" or steps < 1:
            raise ConfigError(f"flow matching takes spacing=trailing and steps ≥ 1, not {spacing} and {steps}.")
        times = [self._shifted((steps - i) / steps) for i in range(steps + 1)]
        return [Level(t, 1 - t, t) for t in times]

    def times(self, uniform_B: Tensor) -> Tensor:
        config = self.config
        if config.density != "logit_normal":
            return self._shifted(1 - uniform_B)
        return self._shifted((config.logit_mean + config.logit_std * torch.special.ndtri(uniform_B)).sigmoid())

    def model_time(self, t: Tensor) -> Tensor:
        return (1000 * t).float()

    def velocity(self, level: Level) -> tuple[Any, Any]:
        return -1.0, 1.0

    def ode(self, level: Level) -> tuple[Any, Any]:
        return 1.0, level.sigma

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones(t.shape, device=t.device)

    def _shifted(self, t: Any) -> Any:
        shift = self.config.shift
        return shift * t / (1 + (shift - 1) * t)
