"""Schedules: diffusers' numbers, published terminal signals, and zero terminal SNR."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

from mmlab.config.errors import ConfigError
from mmlab.diffusion.process import Diffusion
from mmlab.diffusion.schedule import alphas_bar

THEIR_NAME = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [
        ("linear", (1e-4, 0.02)),
        ("scaled_linear", (0.00085, 0.012)),
        ("scaled_linear", (0.0015, 0.0195)),
        ("cosine", ()),
    ],
)
def test_betas_are_those_of_diffusers(schedule, betas):
    ours = Diffusion(schedule, 1000, *betas)
    theirs = DDPMScheduler(
        beta_schedule=THEIR_NAME[schedule], **dict(zip(("beta_start", "beta_end"), betas, strict=False))
    )
    # Theirs are rounded to float32; their product over 1000 timesteps in float64 may then differ by 1e-5.
    torch.testing.assert_close(ours.betas, theirs.betas.double(), rtol=1e-5, atol=1e-9)
    product = torch.cumprod(1 - theirs.betas.double(), 0)
    torch.testing.assert_close(ours.alphas_bar, product, rtol=1e-4, atol=1e-12)
    assert ours.alphas_bar.dtype == torch.float64


def test_float64_product_is_exact():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist()
    product = 1.0
    for beta, bar in zip(betas, alphas_bar("linear", 1000).tolist(), strict=True):
        product *= 1 - beta
        assert bar == pytest.approx(product, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "start", "end", "left"),
    [("linear", None, None, 0.0064), ("scaled_linear", None, None, 0.0119), ("scaled_linear", 0.00085, 0.012, 0.0683)],
)
def test_terminal_signal_of_published_schedules(schedule, start, end, left):
    assert alphas_bar(schedule, 1000, start, end)[-1].sqrt().item() == pytest.approx(left, rel=0.01)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_schedules_fall_and_zero_terminal_snr_ends_in_noise(schedule):
    plain = Diffusion(schedule, 1000)
    rescaled = Diffusion(schedule, 1000, zero_terminal_snr=True, target="v")
    for process in (plain, rescaled):
        assert (process.alphas_bar.diff() < 0).all()
        assert 0 < 1 - process.alphas_bar[0] < 0.01
    assert rescaled.alphas_bar[-1] == 0
    assert rescaled.alphas_bar[0].item() == pytest.approx(plain.alphas_bar[0].item(), rel=1e-12)
    theirs = rescale_zero_terminal_snr(plain.betas)
    torch.testing.assert_close(rescaled.betas, theirs, rtol=1e-9, atol=1e-12)


def test_linear_and_scaled_linear_are_not_swapped():
    linear, scaled = Diffusion("linear").betas, Diffusion("scaled_linear").betas
    torch.testing.assert_close(linear.diff(), linear.diff()[:1].expand(999), rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.sqrt().diff(), scaled.sqrt().diff()[:1].expand(999), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"schedule": "scaled"}, "none of linear, scaled_linear, cosine. Did you mean 'scaled_linear'?"),
        ({"schedule": "cosine", "beta_end": 0.02}, "schedule=cosine has no beta_start and beta_end"),
        ({"beta_start": 0.03}, "must rise within 0 … 1, not from 0.03 to 0.02"),
        ({"timesteps": 1}, "timesteps=1 must be at least 2"),
        ({"timesteps": 100}, "leaves 60% of the picture in its noisiest state"),
        ({"target": "eps"}, "target='eps' is none of epsilon, x0, v"),
        ({"zero_terminal_snr": True}, "needs target=v or target=x0"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma=0 must be above 0"),
    ],
)
def test_a_wrong_argument_is_named(arguments, says):
    with pytest.raises(ConfigError) as error:
        Diffusion(**arguments)
    assert says in str(error.value)
