"""EDM (Karras et al., arXiv 2206.00364): log-normal noise levels and preconditioned inputs and outputs."""

from typing import Any

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.diffusion.config import EDMConfig, SamplerConfig
from mmlab.diffusion.process import Level, NoiseProcess

TIME_SCALE = 1000
"""From c_noise to the denoiser's time, as in consistency models (diffusers' `CMStochasticIterativeScheduler`):
sinusoidal embeddings are made for times 0 … 1000, and c_noise spans less than 3."""


class EDM(NoiseProcess):
    """x_0 + σ·ε, scaled by c_in to unit variance: α = c_in and σ_t = c_in·σ. Times are the noise levels σ.

    The target `v` is that of the paper's network F, (x_0 − c_skip·(x_0 + σ·ε)) / c_out (table 1); for data with a
    standard deviation of 1 it is −v of the diffusion with these α and σ_t. The weight λ(σ) = 1/c_out² of the
    denoiser's loss is 1 for the loss of F (equation 8), and the scaling changes no step of a sampler, so all of them
    work as they do for other processes.

    Args:
        config: settings.

    Raises:
        ConfigError: noise levels that do not rise.
    """

    target = "v"

    def __init__(self, config: EDMConfig):
        if config.sigma_min >= config.sigma_max:
            raise ConfigError(
                f"process.sigma_min={config.sigma_min:g} must be below process.sigma_max={config.sigma_max:g}."
            )
        self.config = config

    def level(self, t: Tensor) -> Level:
        return Level(t, *self._weights(_exact(t)))

    def grid(self, steps: int, spacing: str = SamplerConfig.spacing) -> list[Level]:
        """`steps` noise levels from sigma_max to sigma_min (equation 5), then 0.

        Raises:
            ConfigError: no steps, or a spacing other than `trailing`: rho spaces the levels.
        """
        if spacing != "trailing" or steps < 1:
            raise ConfigError(f"EDM takes spacing=trailing and steps ≥ 1, not {spacing} and {steps}.")
        config = self.config
        last, first = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
        sigmas = [(first + i / max(1, steps - 1) * (last - first)) ** config.rho for i in range(steps)]
        return [*(Level(sigma, *self._weights(sigma)) for sigma in sigmas), Level(0.0, 1.0, 0.0)]

    def times(self, uniform_B: Tensor) -> Tensor:
        # At 0, σ would be 0, whose logarithm is infinite.
        deviation = torch.special.ndtri(uniform_B.clamp(min=2**-54))
        return (self.config.p_mean + self.config.p_std * deviation).exp()

    def model_time(self, t: Tensor) -> Tensor:
        return (TIME_SCALE / 4 * _exact(t).log()).float()

    def velocity(self, level: Level) -> tuple[Any, Any]:
        return level.sigma / self.config.sigma_data, -self.config.sigma_data * level.alpha

    def ode(self, level: Level) -> tuple[Any, Any]:
        return level.alpha, level.sigma / level.alpha

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones(t.shape, device=t.device)

    def _weights(self, sigma: Any) -> tuple[Any, Any]:
        """c_in and c_in·σ."""
        c_in = (sigma**2 + self.config.sigma_data**2) ** -0.5
        return c_in, c_in * sigma


def _exact(t: Tensor) -> Tensor:
    return t if t.device.type == "mps" else t.double()  # mps has no float64
