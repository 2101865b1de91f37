"""Samplers: pure functions from noise to samples, and `Sampler`, which runs the one that a config names.

Each function takes (model, process, x, steps) and the keywords of `Options`: a denoiser that predicts the target of the
process, the process that it was trained with, the noise to start from, and the number of noise levels to visit. It
returns the samples, in float32 or the wider dtype of x; steps that the process does not have raise a ConfigError. None
adds noise in its last step, which ends at the clean level: α = 1, σ = 0. All are written in terms of α and σ and work
with every `NoiseProcess`.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Unpack

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.diffusion.config import SamplerConfig
from mmlab.diffusion.guidance import Clip, Guidance
from mmlab.diffusion.process import Level, NoiseProcess, between
from mmlab.diffusion.walk import Denoiser, Options, Walk


@torch.no_grad()
def ddpm(
    model: Denoiser,
    process: NoiseProcess,
    x: Tensor,
    steps: int,
    variance: str = "posterior",
    **options: Unpack[Options],
) -> Tensor:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2), also between skipped timesteps; needs `rng`.

    Args:
        variance: of the noise that is added: `posterior` (β̃) or `forward` (β).
    """
    walk = Walk(model, process, x, steps, **options)
    for here, there in walk:
        x_0, _ = walk.predict(walk.x, here)
        step = between(here, there)
        mean = step.mean_x_t * walk.x + step.mean_x_0 * x_0
        spread = math.sqrt(step.posterior_variance if variance == "posterior" else step.variance)
        walk.move(mean + spread * walk.fresh() if there.sigma else mean, x_0)
    return walk.x


@torch.no_grad()
def ddim(
    model: Denoiser, process: NoiseProcess, x: Tensor, steps: int, eta: float = 0.0, **options: Unpack[Options]
) -> Tensor:
    """DDIM (arXiv 2010.02502, equation 12).

    Args:
        eta: 0 is deterministic; 1 adds as much noise as `ddpm`, of which it is another form. Above 0 it needs `rng`.
    """
    walk = Walk(model, process, x, steps, **options)
    for here, there in walk:
        x_0, noise = walk.predict(walk.x, here)
        spread = eta * math.sqrt(between(here, there).posterior_variance)
        moved = there.alpha * x_0 + math.sqrt(max(there.sigma**2 - spread**2, 0.0)) * noise
        walk.move(moved + spread * walk.fresh() if spread else moved, x_0)
    return walk.x


def euler(model: Denoiser, process: NoiseProcess, x: Tensor, steps: int, **options: Unpack[Options]) -> Tensor:
    """Euler's method on the probability-flow ODE, first order.

    In the variables of `NoiseProcess.ode` the slope is constant over a step in which x_0 and ε are, so this equals DDIM
    without noise; `heun` corrects the slope.
    """
    return ddim(model, process, x, steps, **options)


@torch.no_grad()
def heun(model: Denoiser, process: NoiseProcess, x: Tensor, steps: int, **options: Unpack[Options]) -> Tensor:
    """Heun's method on the probability-flow ODE (arXiv 2206.00364, algorithm 1), second order.

    Each step calls the model twice. The last one is Euler's and calls it once, as does a step that starts where a
    diffusion's α is below 1/1000 (a cosine schedule's first step, or any at SNR 0): the clock σ/α falls by orders of
    magnitude there, and a straight line over it diverges.
    """
    walk = Walk(model, process, x, steps, **options)
    for here, there in walk:
        x_0, noise = walk.predict(walk.x, here)
        guess = there.alpha * x_0 + there.sigma * noise
        (scale, clock), (scale_there, clock_there) = process.ode(here), process.ode(there)
        if there.sigma and math.isfinite(clock):
            start, end = walk.x / scale, guess / scale_there
            slope = (start - x_0) / clock
            slope_there = (end - walk.predict(guess, there)[0]) / clock_there
            guess = scale_there * (start + (clock_there - clock) * (slope + slope_there) / 2)
        walk.move(guess, x_0)
    return walk.x


@torch.no_grad()
def dpmpp_2m(model: Denoiser, process: NoiseProcess, x: Tensor, steps: int, **options: Unpack[Options]) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), second order with one call of the model per step.

    It extrapolates x_0 in λ = log(α/σ) from the previous step. Where λ is infinite, in the last step and after one that
    started at SNR 0, it takes the first-order step.
    """
    walk = Walk(model, process, x, steps, **options)
    previous: tuple[Level, Tensor] | None = None
    for here, there in walk:
        x_0, _ = walk.predict(walk.x, here)
        ahead = x_0
        if previous is not None and previous[0].alpha and there.sigma:
            earlier, x_0_earlier = previous
            ratio = (_log_snr(there) - _log_snr(here)) / (_log_snr(here) - _log_snr(earlier))
            ahead = x_0 + ratio / 2 * (x_0 - x_0_earlier)
        share = there.sigma / here.sigma
        walk.move(share * walk.x + (there.alpha - share * here.alpha) * ahead, x_0)
        previous = here, x_0
    return walk.x


def _log_snr(level: Level) -> float:
    """λ, half the logarithm of the signal-to-noise ratio."""
    return math.log(level.alpha / level.sigma)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
    "heun": heun,
}
SHARED = ("_target_", "name", "steps", "spacing", "clip", "guidance")
"""Settings of all samplers; the other fields of `SamplerConfig` are parameters of single functions."""


class Sampler:
    """A sampler with its settings.

    Args:
        config: settings.
        clip: bounds on the predicted clean sample.

    Raises:
        ConfigError: a setting that the sampler does not have.
    """

    def __init__(self, config: SamplerConfig, clip: Clip | None = None):
        self.config, self.clip, self.guidance = config, clip, Guidance(config.guidance)
        own = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in SHARED}
        self.own = {name: value for name, value in own.items() if value is not None}
        for name in self.own.keys() - inspect.signature(SAMPLERS[config.name]).parameters.keys():
            raise ConfigError(f"sampler {config.name} has no {name}.")

    def check(self, process: NoiseProcess, steps: int | None = None, latents: bool = False) -> None:
        """Check that the sampler can walk a process, before there are weights.

        Args:
            process: of the model.
            steps: as many at most.
            latents: whether it draws latents, which have no bounds, not pixels.

        Raises:
            ConfigError: a number of steps, a spacing, a target or a clip that does not fit.
        """
        first = process.grid(min(self.config.steps, steps or self.config.steps), self.config.spacing)[0]
        if self.clip is None and process.target == "epsilon" and first.alpha < 1e-3:
            raise ConfigError(
                f"process.target=epsilon leaves the image undetermined in the first step, where alpha is"
                f" {first.alpha:.2g}; set process.target=v, or clip pixels with sampler/clip=pixels."
            )
        if self.clip is not None and latents and self.clip.limit <= 1:
            raise ConfigError(
                f"sampler.clip.limit={self.clip.limit:g} is for pixels; latents have a standard deviation of 1 and no"
                " bounds, so leave out the clip (sampler.clip=null)."
            )

    def __call__(
        self,
        model: Callable[..., Tensor],
        process: NoiseProcess,
        x: Tensor,
        condition: Any = None,
        null: Any = None,
        **options: Any,
    ) -> Tensor:
        """Samples drawn from the noise `x`.

        Args:
            model: a `Denoiser`; with a condition, (x_t, time, condition) → prediction.
            process: the one that the model was trained with.
            x: noise to start from.
            condition, null: see `Guidance`; None for a model without condition.
            **options: `rng`, `on_step` and `source` of `Options`.
        """
        denoiser: Denoiser = model if condition is None else self.guidance(model, condition, null)
        options |= {"spacing": self.config.spacing, "clip": self.clip, **self.own}
        return SAMPLERS[self.config.name](denoiser, process, x, self.config.steps, **options)
