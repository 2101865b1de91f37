"""Noise schedules: ᾱ_t, the share of the picture's variance left at timestep t, in float64.

Names are the field's: "linear" is linear in β (DDPM), "scaled_linear" is linear in √β (latent diffusion, whose own code
calls it "linear"), "cosine" is linear in the angle of (√ᾱ, √(1−ᾱ)).
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError, nearest

BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.0015, 0.0195), "cosine": None}
"""Each schedule's first and last β where none are given: DDPM's, and latent diffusion's on ImageNet."""


def alphas_bar(schedule: str, timesteps: int, beta_start: float | None = None, beta_end: float | None = None) -> Tensor:
    """ᾱ of timesteps 0 … T−1, float64 `[T]`, falling.

    Args:
        schedule: `linear`, `scaled_linear` or `cosine`.
        timesteps: T.
        beta_start: first β; the schedule's own where it is None, and none for `cosine`.
        beta_end: last β, likewise.

    Raises:
        ConfigError: an unknown schedule, fewer than 2 timesteps, or betas that do not rise within (0, 1).
    """
    if schedule not in BETAS:
        names = ", ".join(BETAS)
        raise ConfigError(f"schedule={schedule!r} is none of {names}.{nearest(schedule, BETAS)}")
    if timesteps < 2:
        raise ConfigError(f"timesteps={timesteps} must be at least 2.")
    if schedule == "cosine":
        if beta_start is not None or beta_end is not None:
            raise ConfigError("schedule=cosine has no beta_start and beta_end; leave both out.")
        return torch.cumprod(1 - _cosine_betas(timesteps), 0)
    start, end = BETAS[schedule] or (0.0, 0.0)
    start, end = beta_start if beta_start is not None else start, beta_end if beta_end is not None else end
    if not 0 < start < end < 1:
        raise ConfigError(f"betas must rise within 0 … 1, not from {start:g} to {end:g}.")
    power = 2 if schedule == "scaled_linear" else 1
    betas = torch.linspace(start ** (1 / power), end ** (1 / power), timesteps, dtype=torch.float64) ** power
    return torch.cumprod(1 - betas, 0)


def without_terminal_signal(alphas_bar: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that the last timestep is noise alone (arXiv 2305.08891, algorithm 1)."""
    root = alphas_bar.sqrt()
    return (root[0] * (root - root[-1]) / (root[0] - root[-1])) ** 2


def _cosine_betas(timesteps: int) -> Tensor:
    """β of arXiv 2102.09672, equation 17: clipped at 0.999, for ᾱ would reach 0."""

    def bar(i: int) -> float:
        return math.cos((i / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - bar(i + 1) / bar(i), 0.999) for i in range(timesteps)]
    return torch.tensor(betas, dtype=torch.float64)


SPACINGS = ("trailing", "linspace", "leading")


def spaced(timesteps: int, steps: int, spacing: str) -> list[int]:
    """`steps` different timesteps of 0 … T−1, noisiest first (arXiv 2305.08891, table 2).

    Args:
        timesteps: T.
        steps: how many, at most T.
        spacing: `trailing` starts at T−1, `linspace` starts at T−1 and ends at 0, `leading` ends at 0: it never
            sees the noisiest timesteps, though its samples start as noise.

    Raises:
        ConfigError: an unknown spacing, or a number of steps out of 1 … T.
    """
    if spacing not in SPACINGS:
        raise ConfigError(f"spacing={spacing!r} is none of {', '.join(SPACINGS)}.{nearest(spacing, SPACINGS)}")
    if not 1 <= steps <= timesteps:
        raise ConfigError(f"steps={steps} must lie in 1 … {timesteps}, the number of timesteps.")
    if spacing == "trailing":
        return [round(timesteps - Fraction(i * timesteps, steps)) - 1 for i in range(steps)]
    if spacing == "leading":
        return [i * timesteps // steps for i in reversed(range(steps))]
    return (
        [timesteps - 1]
        if steps == 1
        else [round(Fraction(i * (timesteps - 1), steps - 1)) for i in reversed(range(steps))]
    )
