"""Noise schedules and the timesteps that samplers visit.

ᾱ_t, in float64, is the share of the image's variance that is left at timestep t.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.diffusion.config import DiffusionConfig

BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.0015, 0.0195)}
"""Default first and last β: DDPM's, and latent diffusion's on ImageNet."""


def alphas_bar(config: DiffusionConfig) -> Tensor:
    """ᾱ of timesteps 0 … T−1, float64 `[T]`, falling.

    Raises:
        ConfigError: betas that do not rise within (0, 1), or betas for `cosine`, which has none.
    """
    if config.schedule == "cosine":
        if config.beta_start is not None or config.beta_end is not None:
            raise ConfigError("schedule=cosine has no beta_start and beta_end; leave both out.")
        return torch.cumprod(1 - _cosine_betas(config.timesteps), 0)
    start, end = BETAS[config.schedule]
    start = start if config.beta_start is None else config.beta_start
    end = end if config.beta_end is None else config.beta_end
    if not 0 < start < end < 1:
        raise ConfigError(f"betas must rise within 0 … 1, not from {start:g} to {end:g}.")
    power = 2 if config.schedule == "scaled_linear" else 1
    betas = torch.linspace(start ** (1 / power), end ** (1 / power), config.timesteps, dtype=torch.float64) ** power
    return torch.cumprod(1 - betas, 0)


def without_terminal_signal(alphas_bar: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that the last timestep is pure noise (arXiv 2305.08891, algorithm 1)."""
    root = alphas_bar.sqrt()
    return (root[0] * (root - root[-1]) / (root[0] - root[-1])) ** 2


def _cosine_betas(timesteps: int) -> Tensor:
    """β of arXiv 2102.09672, equation 17: clipped at 0.999, because ᾱ would reach 0."""

    def bar(i: int) -> float:
        return math.cos((i / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - bar(i + 1) / bar(i), 0.999) for i in range(timesteps)]
    return torch.tensor(betas, dtype=torch.float64)


def spaced(timesteps: int, steps: int, spacing: str) -> list[int]:
    """`steps` different timesteps of 0 … T−1, noisiest first (arXiv 2305.08891, table 2).

    Args:
        timesteps: T.
        steps: number of timesteps, at most T.
        spacing: `trailing` starts at T−1, `linspace` starts at T−1 and ends at 0, `leading` ends at 0: it never
            sees the noisiest timesteps, although its samples start as noise.

    Raises:
        ConfigError: a number of steps outside of 1 … T.
        ValueError: an unknown spacing.
    """
    if not 1 <= steps <= timesteps:
        raise ConfigError(f"steps={steps} must lie in 1 … {timesteps}, the number of timesteps.")
    if spacing == "leading":
        return [i * timesteps // steps for i in reversed(range(steps))]
    if spacing == "trailing" or (spacing == "linspace" and steps == 1):
        return [round(timesteps - Fraction(i * timesteps, steps)) - 1 for i in range(steps)]
    if spacing == "linspace":
        return [round(Fraction(i * (timesteps - 1), steps - 1)) for i in reversed(range(steps))]
    raise ValueError(f"unknown spacing {spacing!r}")
