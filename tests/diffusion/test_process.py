"""The process as mathematics: forward steps, posterior, targets, weights, precision."""

import math

import pytest
import torch

from mmlab.config.errors import ConfigError
from mmlab.diffusion.config import DiffusionConfig
from mmlab.diffusion.process import Diffusion, Level, between
from tests.diffusion.gaussian import choices, diffusion, edm, flow_matching

SCHEDULES = choices(DiffusionConfig, "schedule")
PROCESSES = [
    *(diffusion(schedule, target=target) for schedule in SCHEDULES for target in ("epsilon", "x0", "v")),
    diffusion("scaled_linear", zero_terminal_snr=True, target="v"),
    flow_matching(),
    flow_matching(density="logit_normal", shift=3.0, target="x0"),
    edm(),
    edm(sigma_data=0.5),
]
CHAINS = [process for process in PROCESSES if isinstance(process, Diffusion)]


def name(process) -> str:
    snr = "-zero-snr" if getattr(process.config, "zero_terminal_snr", False) else ""
    return f"{getattr(process.config, 'schedule', type(process).__name__)}-{process.target}{snr}"


def samples(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("process", CHAINS, ids=name)
def test_forward_steps_add_up_to_the_closed_form(process):
    t = torch.arange(process.config.timesteps)
    level, step = process.level(t), between(process.level(t), process.level(t - 1))
    # A step multiplies the picture by √(1−β) and adds variance β …
    torch.testing.assert_close(step.scale**2, 1 - process.betas, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(step.variance, process.betas, rtol=1e-9, atol=1e-12)
    # … and all of them together are α_t and σ_t².
    mean, variance = 1.0, 0.0
    for i in range(process.config.timesteps):
        scale, added = step.scale[i].item(), step.variance[i].item()
        mean, variance = scale * mean, scale**2 * variance + added
        assert mean == pytest.approx(level.alpha[i].item(), rel=1e-9)
        assert variance == pytest.approx(level.sigma[i].item() ** 2, rel=1e-9)


@pytest.mark.parametrize("process", PROCESSES, ids=name)
def test_targets_convert_into_each_other(process):
    x_0, noise = samples(0, 64, 2, 3), samples(1, 64, 2, 3)
    t = process.times(torch.rand(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    x_t = process.add_noise(x_0, noise, t)
    for target in ("epsilon", "x0", "v"):
        value = process.target_of(x_0, noise, t, target)
        found_x_0, found_noise = process.split(value, x_t, t, target)
        torch.testing.assert_close(found_x_0, x_0, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found_noise, noise, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(process.split(process.target_of(x_0, noise, t), x_t, t)[0], x_0, rtol=1e-8, atol=1e-8)


def test_targets_are_the_published_ones():
    x_0, noise = samples(0, 4, 5), samples(1, 4, 5)
    process, t = diffusion(), torch.tensor([0, 10, 500, 999])
    alpha = process.alphas_bar[t].sqrt()[:, None]
    sigma = (1 - process.alphas_bar[t]).sqrt()[:, None]
    torch.testing.assert_close(process.add_noise(x_0, noise, t), alpha * x_0 + sigma * noise)
    torch.testing.assert_close(process.target_of(x_0, noise, t), noise)
    torch.testing.assert_close(process.target_of(x_0, noise, t, "x0"), x_0)
    torch.testing.assert_close(process.target_of(x_0, noise, t, "v"), alpha * noise - sigma * x_0)
    flow, t = flow_matching(), torch.tensor([0.1, 0.4, 0.9, 1.0], dtype=torch.float64)
    torch.testing.assert_close(flow.add_noise(x_0, noise, t), (1 - t)[:, None] * x_0 + t[:, None] * noise)
    torch.testing.assert_close(flow.target_of(x_0, noise, t), noise - x_0)


def test_at_zero_snr_v_is_the_picture_and_splits():
    process = diffusion(zero_terminal_snr=True, target="v")
    x_0, noise, t = samples(0, 2, 3), samples(1, 2, 3), torch.tensor([999, 999])
    x_t = process.add_noise(x_0, noise, t)
    assert torch.equal(x_t, noise)
    assert torch.equal(process.target_of(x_0, noise, t), -x_0)
    found, _ = process.split(-x_0, x_t, t)
    assert torch.equal(found, x_0)


@pytest.mark.parametrize("process", CHAINS, ids=name)
def test_posterior_is_ddpm_s_formula(process):
    """Equations 6 and 7 of arXiv 2006.11239, including t = 0, where the posterior is the image, without variance."""
    t = torch.arange(process.config.timesteps)
    bar, before = process.alphas_bar, torch.cat([torch.ones(1, dtype=torch.float64), process.alphas_bar[:-1]])
    x_0, x_t = samples(0, process.config.timesteps, 2), samples(1, process.config.timesteps, 2)
    mean, variance = process.posterior(x_0, x_t, t, t - 1)
    on_x_0 = before.sqrt() * process.betas / (1 - bar)
    on_x_t = (1 - process.betas).sqrt() * (1 - before) / (1 - bar)
    torch.testing.assert_close(mean, on_x_0[:, None] * x_0 + on_x_t[:, None] * x_t, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(variance, (1 - before) / (1 - bar) * process.betas, rtol=1e-7, atol=1e-12)
    assert variance[0] == 0
    assert torch.equal(mean[0], x_0[0])


@pytest.mark.parametrize(
    "process",
    [
        diffusion("linear", timesteps=50, beta_start=0.02, beta_end=0.3),
        flow_matching(),
        edm(sigma_data=0.5, sigma_max=5.0),
    ],
    ids=name,
)
def test_posterior_is_bayes(process):
    """q(x_s|x_t, x_0) q(x_t|x_0) = q(x_t|x_s) q(x_s|x_0), for any pair of levels."""
    grid = process.grid(10)
    for here, there in [(grid[2], grid[3]), (grid[1], grid[7]), (grid[4], grid[9])]:
        step = between(here, there)
        x_0, x_s, x_t = 0.3, -0.8, 0.5

        def log(x: float, mean: float, variance: float) -> float:
            return -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi * variance))

        posterior = log(x_s, step.mean_x_t * x_t + step.mean_x_0 * x_0, step.posterior_variance)
        left = posterior + log(x_t, here.alpha * x_0, here.sigma**2)
        right = log(x_t, step.scale * x_s, step.variance) + log(x_s, there.alpha * x_0, there.sigma**2)
        assert left == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_the_published_ones(gamma):
    t = torch.arange(1000)
    for target in ("epsilon", "x0", "v"):
        process = diffusion("scaled_linear", target=target, min_snr_gamma=gamma)
        snr = process.snr(t)
        capped = snr.clamp(max=gamma)
        expected = {"x0": capped, "epsilon": capped / snr, "v": capped / (snr + 1)}[target]
        torch.testing.assert_close(process.weight(t), expected.float())
        assert torch.equal(diffusion("scaled_linear", target=target).weight(t), torch.ones(1000))
    zero = diffusion(zero_terminal_snr=True, target="v", min_snr_gamma=gamma).weight(t)
    assert zero[-1] == 0
    assert torch.isfinite(zero).all()


def test_min_snr_weighs_the_same_error_of_the_picture_alike_for_all_targets():
    x_0, noise, wrong = (samples(i, 8, 3) for i in range(3))
    t = torch.tensor([0, 5, 50, 200, 400, 600, 800, 999])
    losses = []
    for target in ("epsilon", "x0", "v"):
        process = diffusion(target=target, min_snr_gamma=5.0)
        x_t = process.add_noise(x_0, noise, t)
        # The prediction that says the picture is `wrong`.
        level = process.level(t)
        implied = (x_t - level.alpha[:, None] * wrong) / level.sigma[:, None]
        losses.append(process.loss(process.target_of(wrong, implied, t), x_0, noise, t))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-4, atol=1e-6)


def test_loss_is_the_weighted_mean_square_per_sample():
    process = diffusion(target="v", min_snr_gamma=5.0)
    x_0, noise, t = samples(0, 3, 2, 4), samples(1, 3, 2, 4), torch.tensor([3, 300, 900])
    prediction = samples(2, 3, 2, 4)
    error = (prediction - process.target_of(x_0, noise, t)).square().mean((1, 2))
    torch.testing.assert_close(process.loss(prediction, x_0, noise, t), (process.weight(t) * error).float())
    absolute = (prediction - process.target_of(x_0, noise, t)).abs().mean((1, 2))
    torch.testing.assert_close(process.loss(prediction, x_0, noise, t, "l1"), (process.weight(t) * absolute).float())
    assert process.loss(prediction.bfloat16(), x_0.float(), noise.float(), t).dtype == torch.float32


@pytest.mark.parametrize(
    "process",
    [
        diffusion(),
        diffusion("scaled_linear"),
        flow_matching(),
        edm(),
    ],
    ids=name,
)
def test_half_precision_does_not_change_the_noising(process):
    x_0, noise = samples(0, 32, 8, dtype=torch.float32).bfloat16(), samples(1, 32, 8, dtype=torch.float32)
    t = torch.arange(32) if isinstance(process, Diffusion) else torch.linspace(1e-3, 1, 32, dtype=torch.float64)
    exact = process.add_noise(x_0.double(), noise.double(), t)
    for value in (process.add_noise(x_0, noise, t), process.add_noise(x_0, noise.bfloat16().float(), t)):
        assert value.dtype == torch.float32
    torch.testing.assert_close(process.add_noise(x_0, noise, t).double(), exact, rtol=1e-6, atol=1e-6)
    prediction = noise.bfloat16()
    for value in (*process.split(prediction, x_0, t), process.target_of(x_0, prediction, t)):
        assert value.dtype == torch.float32


def test_the_time_0_noise_survives_where_diffusers_loses_it():
    """Why noising is not diffusers' add_noise: it casts ᾱ to the samples' dtype, and 1 − ᾱ_0 = 1e-4 is lost."""
    from diffusers import DDPMScheduler

    x_0, noise, t = torch.zeros(1, 64).bfloat16(), torch.ones(1, 64).bfloat16(), torch.tensor([0])
    assert DDPMScheduler().add_noise(x_0, noise, t).abs().max() == 0
    torch.testing.assert_close(diffusion().add_noise(x_0, noise, t), torch.full((1, 64), 0.01), rtol=1e-5, atol=0)


def test_training_times_cover_the_process():
    even = torch.linspace(0, 1 - 2**-53, 100_001, dtype=torch.float64)
    t = diffusion().times(even)
    assert (t.min().item(), t.max().item()) == (0, 999)
    assert t.bincount().float().std() < 1
    flow = flow_matching().times(even)
    assert flow.min() > 0
    assert flow.max() == 1
    middle = flow_matching(density="logit_normal").times(even[1:-1])
    torch.testing.assert_close(middle.logit().mean().item(), 0.0, atol=1e-3, rtol=0)
    torch.testing.assert_close(middle.logit().std().item(), 1.0, atol=1e-2, rtol=0)
    shifted = flow_matching(density="logit_normal", shift=3.0).times(even[1:-1])
    torch.testing.assert_close(shifted, 3 * middle / (1 + 2 * middle))
    assert shifted.mean() > middle.mean() + 0.1
    moved = flow_matching(density="logit_normal", logit_mean=0.5, logit_std=0.7).times(even[1:-1])
    torch.testing.assert_close(moved.logit(), 0.5 + 0.7 * middle.logit())
    levels = edm(p_mean=-1.2, p_std=0.9).times(even[1:-1]).log()
    torch.testing.assert_close(levels, -1.2 + 0.9 * middle.logit())
    assert edm().times(even[:1]) > 0


def test_model_times_are_what_embeddings_take():
    assert diffusion().model_time(torch.tensor([7])).tolist() == [7]
    time = flow_matching().model_time(torch.tensor([0.25], dtype=torch.float64))
    assert (time.tolist(), time.dtype) == ([250.0], torch.float32)
    time = edm().model_time(torch.tensor([math.exp(-1.2), 1.0], dtype=torch.float64))
    torch.testing.assert_close(time, torch.tensor([-300.0, 0.0]))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"density": "lognormal"}, "'density' cannot be 'lognormal'. Did you mean 'logit_normal'?"),
        ({"shift": 0.0}, "'shift' must be above 0, not 0.0"),
        ({"target": "epsilon"}, "'target' cannot be 'epsilon'. Options: v, x0"),
        ({"logit_mean": 0.5}, "process.logit_std apply only to process.density=logit_normal"),
    ],
)
def test_a_wrong_argument_of_the_flow_is_named(arguments, says):
    with pytest.raises(ConfigError) as error:
        flow_matching(**arguments)
    assert says in str(error.value)


@pytest.mark.parametrize("deviation", [0.5, 1.0])
def test_edm_is_the_paper_s(deviation):
    """The denoiser D of equation 7, the loss of equation 2 with λ of table 1, and the levels of equation 5."""
    process = edm(sigma_data=deviation)
    sigma = torch.tensor([0.002, 0.1, 0.8, 3.0, 80.0], dtype=torch.float64)
    y, noise, column = deviation * samples(0, 5, 6), samples(1, 5, 6), sigma[:, None]

    def network(scaled: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        return torch.tanh(scaled) + c_noise[:, None]

    total = column**2 + deviation**2
    c_skip, c_out = deviation**2 / total, column * deviation / total.sqrt()
    c_in, c_noise = 1 / total.sqrt(), sigma.log() / 4
    noised = y + column * noise
    denoised = c_skip * noised + c_out * network(c_in * noised, c_noise)
    weight = total / (column * deviation) ** 2
    loss = (weight * (denoised - y) ** 2).mean(1)

    x_t = process.add_noise(y, noise, sigma)
    torch.testing.assert_close(x_t, c_in * noised)
    torch.testing.assert_close(process.model_time(sigma), (1000 * c_noise).float())
    prediction = network(x_t, c_noise)
    torch.testing.assert_close(process.split(prediction, x_t, sigma)[0], denoised)
    torch.testing.assert_close(process.loss(prediction, y, noise, sigma), loss.float(), rtol=1e-4, atol=1e-6)
    levels = [(80 ** (1 / 7) + i / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(10)]
    assert [level.time for level in process.grid(10)] == pytest.approx([*levels, 0])
    assert [level.time for level in process.grid(1)] == [pytest.approx(80), 0]


def test_edm_sees_the_same_signal_at_any_deviation_of_the_data():
    paper, ours = edm(sigma_data=0.5, p_mean=-0.5 - math.log(2)), edm()
    even = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    # Data with half the deviation have a quarter of the variance.
    torch.testing.assert_close(0.25 * paper.snr(paper.times(even)), ours.snr(ours.times(even)))


@pytest.mark.parametrize(
    ("arguments", "spacing", "says"),
    [
        ({"sigma_min": 90.0}, "trailing", "process.sigma_min=90 must be below process.sigma_max=80"),
        ({}, "leading", "EDM takes spacing=trailing"),
    ],
)
def test_levels_that_edm_does_not_have_are_refused(arguments, spacing, says):
    with pytest.raises(ConfigError, match=says):
        edm(**arguments).grid(10, spacing)


def test_an_unknown_conversion_is_refused():
    with pytest.raises(ValueError, match="'eps' is none of"):
        diffusion().target_of(samples(0, 1, 2), samples(1, 1, 2), torch.tensor([1]), "eps")


def test_the_clean_level_is_time_minus_one():
    assert diffusion().level(torch.tensor(-1))[1:] == (1.0, 0.0)
    assert isinstance(diffusion().level(torch.tensor(-1)), Level)
