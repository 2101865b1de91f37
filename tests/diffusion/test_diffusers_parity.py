"""Samplers compared with diffusers' schedulers on the same model, noise and grid; and why some differ."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import Tensor

from mmlab.diffusion.config import ClipConfig
from mmlab.diffusion.guidance import Clip
from mmlab.diffusion.process import Diffusion
from mmlab.diffusion.samplers import ddim, ddpm, dpmpp_2m, euler, heun
from tests.diffusion.gaussian import diffusion, edm, flow_matching

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
NAMES = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
TARGETS = [*NAMES]


def model(x: Tensor, t: Tensor) -> Tensor:
    """Any smooth function of the state and the time."""
    return torch.tanh(0.8 * x + 0.3 * x.flip(-1)) + 0.2 * torch.sin(0.004 * t.to(x.dtype)).view(-1, 1, 1, 1)


def process(target: str = "epsilon") -> Diffusion:
    return diffusion("scaled_linear", target=target)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def in_float64(scheduler):
    """Diffusers rounds ᾱ to float32; with ours in its place, DDPM and DDIM compute in float64."""
    scheduler.alphas_cumprod = process().alphas_bar.clone()
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def run(scheduler, x: Tensor, scaled: bool = False, **options) -> Tensor:
    """Diffusers' loop; `scaled` schedulers keep x/α as their state."""
    if scaled:
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if scaled else x
        x = scheduler.step(model(seen, t.expand(len(x))), t, x, **options).prev_sample
    return x


def close(ours: Tensor, theirs: Tensor, within: float) -> None:
    assert ours.abs().max() > 0.3
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=within, atol=within)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("variance", "theirs"), [("posterior", "fixed_small"), ("forward", "fixed_large")])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 50), ("trailing", 30), ("linspace", 30), ("leading", 1000)])
def test_ddpm(target, variance, theirs, spacing, steps):
    scheduler = DDPMScheduler(
        **BETAS, prediction_type=NAMES[target], variance_type=theirs, clip_sample=False, timestep_spacing=spacing
    )
    in_float64(scheduler).set_timesteps(steps)
    expected = run(scheduler, X, generator=generator())
    ours = ddpm(model, process(target), X, steps, variance, rng=generator(), spacing=spacing)
    if spacing == "trailing" and variance == "forward":
        # Theirs adds noise in the last step of a grid that does not end at timestep 0: it asks `if t > 0`.
        last = process(target).grid(steps, spacing)[-2]
        assert scheduler.timesteps[-1] > 0
        assert (ours - expected).std().item() == pytest.approx(last.sigma, rel=0.1)
    else:
        close(ours, expected, 1e-7)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 50), ("trailing", 50), ("leading", 1000)])
def test_ddim(target, eta, spacing, steps):
    scheduler = DDIMScheduler(**BETAS, prediction_type=NAMES[target], clip_sample=False, timestep_spacing=spacing)
    in_float64(scheduler).set_timesteps(steps)
    expected = run(scheduler, X, eta=eta, generator=generator())
    close(ddim(model, process(target), X, steps, eta, rng=generator(), spacing=spacing), expected, 1e-7)


def test_ddim_goes_where_the_next_step_starts():
    """Diffusers' DDIM takes t − T//steps for the next timestep: from 999 to 966 with 30 trailing steps, then from 965.

    A step thus ends at another noise level than the next one starts from.
    """
    scheduler = in_float64(DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing"))
    scheduler.set_timesteps(30)
    grid = [*scheduler.timesteps.tolist(), -1]
    assert sum(next_t != t - 1000 // 30 for t, next_t in pairwise(grid)) >= 10
    ours = ddim(model, process(), X, 30)
    assert (ours - run(scheduler, X)).abs().max() > 1e-3
    # Told the right end of each jump, theirs is ours: 1000 // 29 is 34.
    x = X
    for t, next_t in pairwise(grid):
        scheduler.num_inference_steps = {33: 30, 34: 29}[t - next_t]
        x = scheduler.step(model(x, torch.tensor([t])), t, x).prev_sample
    close(ours, x, 1e-7)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_clipping(sampler):
    """DDIM's noise must follow the clipped image, as diffusers' does with an option: only then is η = 1 DDPM."""
    kind, ours, options = {
        "ddpm": (DDPMScheduler, ddpm, {}),
        "ddim": (DDIMScheduler, ddim, {"eta": 1.0, "use_clipped_model_output": True}),
    }[sampler]
    scheduler = in_float64(kind(**BETAS, clip_sample=True, clip_sample_range=0.4))
    scheduler.set_timesteps(50)
    expected = run(scheduler, X, generator=generator(), **options)
    eta = {"eta": 1.0} if sampler == "ddim" else {}
    close(
        ours(model, process(), X, 50, rng=generator(), spacing="leading", clip=Clip(ClipConfig(limit=0.4)), **eta),
        expected,
        1e-7,
    )


def test_dynamic_thresholding():
    """Diffusers' `sample_max_value` is 1 by default, which makes it static clipping; Imagen has no maximum."""
    scheduler = in_float64(
        DDPMScheduler(**BETAS, thresholding=True, sample_max_value=1e9, dynamic_thresholding_ratio=0.9)
    )
    scheduler.set_timesteps(50)
    expected = run(scheduler, X, generator=generator())
    ours = ddpm(
        model, process(), X, 50, rng=generator(), spacing="leading", clip=Clip(ClipConfig(limit=1.0, percentile=0.9))
    )
    close(ours, expected, 1e-7)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_dpm_solver(target, steps):
    """Trailing grids; for linspace and leading, theirs divides by steps + 1, unlike diffusers' other schedulers."""
    scheduler = DPMSolverMultistepScheduler(**BETAS, prediction_type=NAMES[target], timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    ours = dpmpp_2m(model, process(target), X, steps)
    close(ours, run(scheduler, X.float()), 3e-4)  # theirs has float32 coefficients


def test_dpm_solver_at_zero_snr():
    """Theirs sets ᾱ of the last timestep to 2⁻²⁴, so that λ is finite; ours takes the limit. They differ little."""
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    scheduler.set_timesteps(20)
    zero_snr = diffusion("scaled_linear", zero_terminal_snr=True, target="v")
    close(dpmpp_2m(model, zero_snr, X, 20), run(scheduler, X.float()), 0.02)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 10), ("trailing", 50), ("leading", 20)])
@pytest.mark.parametrize(("kind", "ours"), [(EulerDiscreteScheduler, euler), (HeunDiscreteScheduler, heun)])
def test_euler_and_heun(target, spacing, steps, kind, ours):
    """Trailing and leading grids; on linspace, theirs take fractional timesteps that a discrete-time model never saw.

    Their pipelines start trailing grids from σ·noise, whose model input is not of unit variance as it was in training;
    `run` starts from √(σ²+1)·noise, which is our x.
    """
    scheduler = kind(**BETAS, prediction_type=NAMES[target], timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    theirs = run(scheduler, X.float(), scaled=True)
    close(
        ours(model, process(target), X, steps, spacing=spacing), theirs, 2e-3 if kind is HeunDiscreteScheduler else 3e-4
    )


def test_heun_on_a_cosine_schedule():
    """Theirs diverges: its first step is a straight line from σ/α = 20,000 to 12. Ours takes Euler's there.

    The model is exact for standard normal data, whose sample is the noise it starts from.
    """
    cosine = diffusion("cosine")
    scheduler = HeunDiscreteScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    sigmas = cosine.level(torch.arange(1000)).sigma
    x = X.float() * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(sigmas[t.long()].float() * seen, t, x).prev_sample
    assert (x - X).abs().mean() > 1

    def normal_data(x: Tensor, t: Tensor) -> Tensor:
        return sigmas[t].view(-1, 1, 1, 1) * x

    assert (heun(normal_data, cosine, X, 20) - X).abs().mean() < 0.03


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 28])
def test_flow_matching(shift, steps):
    """On the grid 1 … 1/steps that its pipelines pass; the scheduler's own ends at 1/1000 whatever the steps."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    x = X.float()
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x))), t, x).prev_sample
    close(euler(model, flow_matching(shift=shift), X, steps), x, 1e-4)


@pytest.mark.parametrize("deviation", [0.5, 1.0])
@pytest.mark.parametrize(("kind", "ours"), [(EDMEulerScheduler, euler), (EDMDPMSolverMultistepScheduler, dpmpp_2m)])
def test_edm(deviation, kind, ours):
    """Their state is x_0 + σ·ε, of which our x is the denoiser's input; they start from √(σ² + 1)·noise."""
    levels = {"sigma_data": deviation, "sigma_min": 0.01, "sigma_max": 30.0, "rho": 5.0}
    scheduler = kind(**levels)
    scheduler.set_timesteps(20)
    x = X.float() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(seen, 1000 * t.expand(len(x))), t, x).prev_sample
    close(ours(model, edm(**levels), X, 20), x, 1e-3)
