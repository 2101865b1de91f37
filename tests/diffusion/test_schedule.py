"""Schedules and timesteps: diffusers' numbers, published terminal signals, zero terminal SNR."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

from mmlab.config.errors import ConfigError
from mmlab.diffusion.config import DiffusionConfig, SamplerConfig
from mmlab.diffusion.schedule import alphas_bar, spaced
from tests.diffusion.gaussian import choices, diffusion, flow_matching

SPACINGS, SCHEDULES = choices(SamplerConfig, "spacing"), choices(DiffusionConfig, "schedule")
THEIR_NAME = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [
        ("linear", {"beta_start": 1e-4, "beta_end": 0.02}),
        ("scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
        ("scaled_linear", {"beta_start": 0.0015, "beta_end": 0.0195}),
        ("cosine", {}),
    ],
)
def test_betas_are_those_of_diffusers(schedule, betas):
    ours = diffusion(schedule, **betas)
    theirs = DDPMScheduler(beta_schedule=THEIR_NAME[schedule], **betas)
    # Theirs are rounded to float32; their product over 1000 timesteps in float64 may then differ by 1e-5.
    torch.testing.assert_close(ours.betas, theirs.betas.double(), rtol=1e-5, atol=1e-9)
    product = torch.cumprod(1 - theirs.betas.double(), 0)
    torch.testing.assert_close(ours.alphas_bar, product, rtol=1e-4, atol=1e-12)
    assert ours.alphas_bar.dtype == torch.float64


def test_float64_product_is_exact():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist()
    product = 1.0
    for beta, bar in zip(betas, alphas_bar(DiffusionConfig()).tolist(), strict=True):
        product *= 1 - beta
        assert bar == pytest.approx(product, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "start", "end", "left"),
    [("linear", None, None, 0.0064), ("scaled_linear", None, None, 0.0119), ("scaled_linear", 0.00085, 0.012, 0.0683)],
)
def test_terminal_signal_of_published_schedules(schedule, start, end, left):
    bars = alphas_bar(DiffusionConfig(schedule=schedule, beta_start=start, beta_end=end))
    assert bars[-1].sqrt().item() == pytest.approx(left, rel=0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_fall_and_zero_terminal_snr_ends_in_noise(schedule):
    plain = diffusion(schedule)
    rescaled = diffusion(schedule, zero_terminal_snr=True, target="v")
    for process in (plain, rescaled):
        assert (process.alphas_bar.diff() < 0).all()
        assert 0 < 1 - process.alphas_bar[0] < 0.01
    assert rescaled.alphas_bar[-1] == 0
    assert rescaled.alphas_bar[0].item() == pytest.approx(plain.alphas_bar[0].item(), rel=1e-12)
    theirs = rescale_zero_terminal_snr(plain.betas)
    torch.testing.assert_close(rescaled.betas, theirs, rtol=1e-9, atol=1e-12)


def test_linear_and_scaled_linear_are_not_swapped():
    linear, scaled = (
        diffusion("linear").betas,
        diffusion("scaled_linear").betas,
    )
    torch.testing.assert_close(linear.diff(), linear.diff()[:1].expand(999), rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.sqrt().diff(), scaled.sqrt().diff()[:1].expand(999), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"schedule": "scaled"}, "'schedule' cannot be 'scaled'. Did you mean 'scaled_linear'?"),
        ({"schedule": "cosine", "beta_end": 0.02}, "schedule=cosine has no beta_start and beta_end"),
        ({"beta_start": 0.03}, "must rise within 0 … 1, not from 0.03 to 0.02"),
        ({"timesteps": 1}, "'timesteps' must be above 1, not 1"),
        ({"timesteps": 100}, "leaves 60% of the image in its noisiest state"),
        ({"target": "eps"}, "'target' cannot be 'eps'. Did you mean 'epsilon'?"),
        ({"zero_terminal_snr": True}, "needs target=v or target=x0"),
        ({"min_snr_gamma": 0.0}, "'min_snr_gamma' must be above 0, not 0.0"),
    ],
)
def test_a_wrong_argument_is_named(arguments, says):
    with pytest.raises(ConfigError) as error:
        diffusion(**arguments)
    assert says in str(error.value)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [2, 10, 50, 250, 1000])
def test_grids_are_those_of_diffusers(spacing, steps):
    theirs = DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    assert spaced(1000, steps, spacing) == theirs.timesteps.tolist()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_gives_that_many_falling_timesteps(spacing):
    for steps in range(1, 201):
        grid = spaced(200, steps, spacing)
        assert len(grid) == steps
        assert grid == sorted(set(grid), reverse=True)
        assert grid[-1] >= 0
        assert grid[0] < 200
        if spacing != "leading":
            assert grid[0] == 199


def test_leading_spreads_evenly_where_diffusers_does_not():
    """Diffusers rounds the stride: 600 of 1000 steps start at 599, where a sixth of the image is still there."""
    theirs = DDIMScheduler()
    theirs.set_timesteps(600)
    assert theirs.timesteps[0] == 599
    assert diffusion().level(torch.tensor(599)).alpha > 0.15
    assert spaced(1000, 600, "leading")[0] == 998


def test_one_step_starts_at_the_noisiest_timestep():
    assert spaced(1000, 1, "linspace") == spaced(1000, 1, "trailing") == [999]


def test_a_grid_ends_clean():
    for process in (diffusion(), flow_matching()):
        grid = process.grid(7)
        assert len(grid) == 8
        assert grid[-1][1:] == (1.0, 0.0)
        assert [level.sigma for level in grid] == sorted((level.sigma for level in grid), reverse=True)


def test_zero_terminal_snr_starts_from_noise_alone():
    process = diffusion(zero_terminal_snr=True, target="v")
    for spacing in ("trailing", "linspace"):
        assert process.grid(20, spacing)[0][1:] == (0.0, 1.0)
    assert len(process.grid(1000, "leading")) == 1001
    with pytest.raises(ConfigError, match="starts at timestep 950, but a model with zero_terminal_snr"):
        process.grid(20, "leading")


def test_shift_moves_the_flow_towards_noise():
    times = [level.time for level in flow_matching(shift=3.0).grid(4)]
    assert times == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((1000, 0, "trailing"), "steps=0 must lie in 1 … 1000"),
        ((10, 11, "trailing"), "steps=11 must lie in 1 … 10"),
    ],
)
def test_a_wrong_grid_is_refused(arguments, says):
    with pytest.raises(ConfigError) as error:
        spaced(*arguments)
    assert says in str(error.value)


def test_the_flow_takes_one_spacing():
    with pytest.raises(ConfigError, match="flow matching takes spacing=trailing"):
        flow_matching().grid(5, "leading")
