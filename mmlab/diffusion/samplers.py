"""Samplers: pure functions from noise to samples.

Each takes (model, process, x, steps) and the keywords of `Options`. None adds noise in its last step, which ends at the
clean level: α = 1, σ = 0. They hold for every `NoiseProcess`, as they are written in α and σ.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError, nearest
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
    """Ancestral sampling (arXiv 2006.11239, algorithm 2; between skipped timesteps, too).

    Args:
        model: predicts the process's target.
        process: that the model was trained with.
        x: noise to start from.
        steps: calls of the model.
        variance: of the noise added: `posterior` (β̃, right for data that are one point) or `forward` (β, right for
            data that are normal).
        **options: see `Options`; `rng` is needed.

    Raises:
        ConfigError: an unknown variance, or steps that the process does not have.
    """
    if variance not in ("posterior", "forward"):
        raise ConfigError(f"variance={variance!r} is none of posterior, forward.")
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
        model: predicts the process's target.
        process: that the model was trained with.
        x: noise to start from.
        steps: calls of the model.
        eta: 0 is deterministic; 1 adds as much noise as `ddpm`, of which it then is another form.
        **options: see `Options`; `rng` is needed for eta > 0.

    Raises:
        ConfigError: an eta out of 0 … 1, or steps that the process does not have.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta={eta:g} must lie in 0 … 1.")
    walk = Walk(model, process, x, steps, **options)
    for here, there in walk:
        x_0, noise = walk.predict(walk.x, here)
        spread = eta * math.sqrt(between(here, there).posterior_variance)
        moved = there.alpha * x_0 + math.sqrt(max(there.sigma**2 - spread**2, 0.0)) * noise
        walk.move(moved + spread * walk.fresh() if spread else moved, x_0)
    return walk.x


def euler(model: Denoiser, process: NoiseProcess, x: Tensor, steps: int, **options: Unpack[Options]) -> Tensor:
    """Euler's method on the probability-flow ODE, first order.

    In the variables of `NoiseProcess.ode` the slope is constant over a step where x_0 and ε are, so this is DDIM
    without noise; `heun` corrects it.

    Args:
        model: predicts the process's target.
        process: that the model was trained with.
        x: noise to start from.
        steps: calls of the model.
        **options: see `Options`.

    Raises:
        ConfigError: steps that the process does not have.
    """
    return ddim(model, process, x, steps, **options)


@torch.no_grad()
def heun(model: Denoiser, process: NoiseProcess, x: Tensor, steps: int, **options: Unpack[Options]) -> Tensor:
    """Heun's method on the probability-flow ODE (arXiv 2206.00364, algorithm 1), second order.

    Its last step is Euler's, and so is one that starts where a diffusion's α is below 1/1000 (a cosine schedule's first
    step, or any at SNR 0): the clock σ/α then falls by orders of magnitude, and a straight line over it diverges.

    Args:
        model: predicts the process's target.
        process: that the model was trained with.
        x: noise to start from.
        steps: each calls the model twice, the last one once.
        **options: see `Options`.

    Raises:
        ConfigError: steps that the process does not have.
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

    It extrapolates x_0 in λ = log(α/σ) from the step before. Where λ is infinite, in the last step and after one that
    started at SNR 0, it takes the first-order step.

    Args:
        model: predicts the process's target.
        process: that the model was trained with.
        x: noise to start from.
        steps: calls of the model.
        **options: see `Options`.

    Raises:
        ConfigError: steps that the process does not have.
    """
    walk = Walk(model, process, x, steps, **options)
    before: tuple[Level, Tensor] | None = None
    for here, there in walk:
        x_0, _ = walk.predict(walk.x, here)
        ahead = x_0
        if before is not None and before[0].alpha and there.sigma:
            earlier, x_0_earlier = before
            ratio = (_log_snr(there) - _log_snr(here)) / (_log_snr(here) - _log_snr(earlier))
            ahead = x_0 + ratio / 2 * (x_0 - x_0_earlier)
        kept = there.sigma / here.sigma
        walk.move(kept * walk.x + (there.alpha - kept * here.alpha) * ahead, x_0)
        before = here, x_0
    return walk.x


def _log_snr(level: Level) -> float:
    """λ: half the logarithm of the signal-to-noise ratio."""
    return math.log(level.alpha / level.sigma)


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m, "euler": euler, "heun": heun}


class Sampler:
    """A sampler and its settings, as a config names them.

    Args:
        name: `ddpm`, `ddim`, `dpmpp_2m`, `euler` or `heun`.
        steps: levels that it visits.
        spacing: `trailing`, `linspace` or `leading`.
        clip: bounds on the predicted clean sample; none for latents.
        eta: of `ddim`.
        variance: of `ddpm`.
        guidance: of conditional samples; None: the conditional model alone.

    Raises:
        ConfigError: an unknown sampler, or a setting that it does not have.
    """

    def __init__(
        self,
        name: str = "ddim",
        steps: int = 50,
        spacing: str = "trailing",
        clip: Clip | None = None,
        eta: float | None = None,
        variance: str | None = None,
        guidance: Guidance | None = None,
    ):
        if name not in SAMPLERS:
            raise ConfigError(f"sampler {name!r} is none of {', '.join(SAMPLERS)}.{nearest(name, SAMPLERS)}")
        self.name, self.steps, self.spacing, self.clip = name, steps, spacing, clip
        # TRANSITION: guidance may be its settings
        self.guidance = Guidance(guidance.scale, guidance.interval, guidance.rescale) if guidance else Guidance()
        self.own = {key: value for key, value in (("eta", eta), ("variance", variance)) if value is not None}
        for key in self.own:
            if key not in inspect.signature(SAMPLERS[name]).parameters:
                raise ConfigError(f"sampler {name} has no {key}.")

    def __call__(
        self,
        model: Callable[..., Tensor],
        process: NoiseProcess,
        x: Tensor,
        condition: Any = None,
        null: Any = None,
        **options: Any,
    ) -> Tensor:
        """Samples from noise `x`.

        Args:
            model: a `Denoiser`; with a condition (x_t, time, condition) → prediction.
            process: that the model was trained with.
            x: noise to start from.
            condition, null: see `Guidance`; None for a model without one.
            **options: `rng` and `on_step` of `Options`.
        """
        chosen: Any = SAMPLERS[self.name]
        denoiser: Denoiser = model if condition is None else self.guidance(model, condition, null)
        return chosen(denoiser, process, x, self.steps, spacing=self.spacing, clip=self.clip, **self.own, **options)
