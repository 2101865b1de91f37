"""Flow matching (rectified flow): the straight line from picture to noise, beside diffusion's arc."""

from typing import Any

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError, nearest
from mmlab.diffusion.process import Level, NoiseProcess

DENSITIES = ("uniform", "logit_normal")


class FlowMatching(NoiseProcess):
    """x_t = (1−t)·x_0 + t·ε with times in (0, 1]; the velocity v = ε − x_0 does not depend on t.

    Args:
        density: of the training times, `uniform` or `logit_normal`.
        shift: moves training and sampling times towards the noise, t' = shift·t/(1 + (shift−1)·t); above 1 for large
            pictures, 1 leaves them.
        target: `v` or `x0`.

    Raises:
        ConfigError: an unknown density or target, or a shift not above 0.
    """

    targets = ("v", "x0")  # ε says nothing of the picture at t = 1, where sampling starts

    def __init__(self, density: str = "uniform", shift: float = 1.0, target: str = "v"):
        super().__init__(target)
        if density not in DENSITIES:
            raise ConfigError(f"density={density!r} is none of {', '.join(DENSITIES)}.{nearest(density, DENSITIES)}")
        if shift <= 0:
            raise ConfigError(f"shift={shift:g} must be above 0; 1 leaves the times as they are.")
        self.density, self.shift = density, shift

    def level(self, t: Tensor) -> Level:
        exact = t if t.device.type == "mps" else t.double()  # mps has no float64
        return Level(t, 1 - exact, exact)

    def grid(self, steps: int, spacing: str = "trailing") -> list[Level]:
        """`steps` times from 1 in equal steps of the time before its shift.

        Raises:
            ConfigError: no steps, or another spacing than `trailing`: the flow starts at t = 1.
        """
        if spacing != "trailing" or steps < 1:
            raise ConfigError(f"flow matching takes spacing=trailing and steps ≥ 1, not {spacing} and {steps}.")
        times = [self._shifted((steps - i) / steps) for i in range(steps + 1)]
        return [Level(t, 1 - t, t) for t in times]

    def times(self, uniform_B: Tensor) -> Tensor:
        even = torch.special.ndtri(uniform_B).sigmoid() if self.density == "logit_normal" else 1 - uniform_B
        return self._shifted(even)

    def model_time(self, t: Tensor) -> Tensor:
        return (1000 * t).float()

    def velocity(self, level: Level) -> tuple[Any, Any]:
        return -1.0, 1.0

    def ode(self, level: Level) -> tuple[Any, Any]:
        return 1.0, level.sigma

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones(t.shape, device=t.device)

    def _shifted(self, t: Any) -> Any:
        return self.shift * t / (1 + (self.shift - 1) * t)
