"""Samplers against exact solutions, each other and their definitions."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.diffusion.config import ClipConfig, DiffusionConfig, FlowMatchingConfig, GuidanceConfig, SamplerConfig
from mmlab.diffusion.flow import FlowMatching
from mmlab.diffusion.guidance import Clip, Guidance
from mmlab.diffusion.process import Diffusion, Level, between
from mmlab.diffusion.samplers import SAMPLERS, Sampler, ddim, ddpm, dpmpp_2m, euler, heun
from mmlab.diffusion.walk import Source, Step, Trajectory
from mmlab.keyed import normal
from tests.diffusion.gaussian import MEAN, SPREAD, GaussianDenoiser, choices, diffusion, edm, exact, flow_matching

X = torch.randn(32, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ZERO_SNR = diffusion(zero_terminal_snr=True, target="v")
PROCESSES = [
    diffusion(),
    diffusion("scaled_linear", target="v"),
    diffusion("cosine", target="x0"),
    ZERO_SNR,
    flow_matching(),
    flow_matching(shift=3.0, target="x0"),
    edm(),
    edm(sigma_data=0.5, sigma_max=40.0),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Arc(Diffusion):
    """Levels at equal angles, all with signal and noise, so that a solver's order shows."""

    def grid(self, steps: int, spacing: str = "trailing") -> list[Level]:
        angles = [1.4 - 1.2 * i / steps for i in range(steps + 1)]
        return [Level(angle, math.cos(angle), math.sin(angle)) for angle in angles]

    def model_time(self, t: Tensor) -> Tensor:
        return t


class Line(FlowMatching):
    """Levels of the flow, likewise."""

    def grid(self, steps: int, spacing: str = "trailing") -> list[Level]:
        times = [0.9 - 0.7 * i / steps for i in range(steps + 1)]
        return [Level(time, 1 - time, time) for time in times]


@pytest.mark.parametrize(
    "process",
    [
        *(Arc(DiffusionConfig(target=t)) for t in ("epsilon", "x0", "v")),
        *(Line(FlowMatchingConfig(target=t)) for t in ("v", "x0")),
    ],
)
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (euler, 1), (heun, 2), (dpmpp_2m, 2)])
def test_solvers_converge_at_their_order(process, sampler, order):
    def error(steps: int) -> float:
        found = sampler(GaussianDenoiser(process, steps), process, X, steps)
        levels = process.grid(steps)
        return (found - exact(X, levels[0], levels[-1])).abs().mean().item()

    assert math.log2(error(256) / error(512)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("sampler", [ddim, heun, dpmpp_2m])
def test_a_whole_run_ends_at_the_exact_sample(process, sampler):
    levels = process.grid(100)
    states: list[Step] = []
    sampler(GaussianDenoiser(process, 100), process, X, 100, on_step=states.append)
    # The last step, to the mean of the possible images, does not depend on the solver.
    error = (states[-2].x - exact(X, levels[0], levels[-2])).abs().mean()
    assert error < (0.02 if sampler is ddim else 0.006)


@pytest.mark.parametrize("steps", [2, 5, 10])
def test_heun_starts_well_where_next_to_nothing_of_the_picture_is_left(steps):
    """Over the first step of a cosine schedule σ/α falls by orders of magnitude, the more the fewer steps there are."""
    process = diffusion("cosine", target="x0")
    levels, states = process.grid(steps), list[Step]()
    heun(GaussianDenoiser(process, steps), process, X, steps, on_step=states.append)
    assert (states[-2].x - exact(X, levels[0], levels[-2])).abs().mean() < 0.05


def test_a_whole_run_of_heun_on_the_flow_is_second_order():
    def error(sampler, steps: int) -> float:
        flow = flow_matching()
        return (sampler(GaussianDenoiser(flow, steps), flow, X, steps) - (MEAN + SPREAD * X)).abs().mean().item()

    assert error(euler, 32) / error(euler, 64) == pytest.approx(2, abs=0.1)
    assert error(heun, 32) / error(heun, 64) == pytest.approx(4, abs=0.3)
    assert error(dpmpp_2m, 256) / error(dpmpp_2m, 512) > 3


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("sampler", [ddpm, partial(ddpm, variance="forward"), partial(ddim, eta=1.0)])
def test_ancestral_samples_have_the_data_s_moments(process, sampler):
    x = normal(range(10_000), (1,), "start").double()
    samples = sampler(GaussianDenoiser(process, 500), process, x, 500, rng=generator())
    last = process.grid(500)[-2]
    # The last step gives the mean of the possible images, which has less variance than the images.
    spread = last.alpha * SPREAD**2 / ((last.alpha * SPREAD) ** 2 + last.sigma**2) ** 0.5
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.012)
    assert samples.std().item() == pytest.approx(spread, abs=0.012)


@pytest.mark.parametrize(
    "process", [diffusion(timesteps=50, beta_start=0.01, beta_end=0.3), flow_matching(), ZERO_SNR, edm()]
)
def test_ddim_with_eta_1_is_ddpm(process):
    steps = 50
    model = GaussianDenoiser(process, steps)
    one = ddim(model, process, X, steps, eta=1.0, rng=generator())
    other = ddpm(model, process, X, steps, rng=generator())
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_ddpm_on_the_full_grid_samples_the_posterior():
    """With the data known, each step's mean and variance are those of q(x_{t−1} | x_t, x_0)."""
    process = diffusion(timesteps=30, beta_start=0.01, beta_end=0.5, target="x0")
    x_0 = torch.full((20_000, 1), 0.8, dtype=torch.float64)
    states: list[Step] = []
    ddpm(lambda x, t: x_0, process, x_0 * 0 + 0.3, 30, rng=generator(), on_step=states.append)
    x_t = x_0 * 0 + 0.3
    for step in states[:-1]:
        t = torch.full((20_000,), 30 - step.number)
        mean, variance = process.posterior(x_0, x_t, t, t - 1)
        residual = step.x - mean
        assert abs(residual.mean().item()) < 4 * (variance[0].item() / 20_000) ** 0.5
        assert residual.std().item() == pytest.approx(variance[0].item() ** 0.5, rel=0.03)
        x_t = step.x
    torch.testing.assert_close(states[-1].x, x_0)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("steps", [1, 2, 17])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_step_adds_no_noise(process, steps, name):
    """The samples are the last clean samples that were predicted, for every sampler and number of steps."""
    states: list[Step] = []
    options = {"eta": 1.0} if name == "ddim" else {"variance": "forward"} if name == "ddpm" else {}
    model = GaussianDenoiser(process, steps)
    samples = SAMPLERS[name](model, process, X, steps, rng=generator(), on_step=states.append, **options)
    torch.testing.assert_close(samples, states[-1].x_0, rtol=1e-12, atol=1e-12)
    assert torch.isfinite(samples).all()
    assert [state.number for state in states] == list(range(1, steps + 1))
    finite_clocks = [math.isfinite(process.ode(level)[1]) for level in process.grid(steps)[:-1]]
    assert model.calls == (steps + sum(finite_clocks[:-1]) if name == "heun" else steps)


def test_euler_is_ddim_without_noise():
    for process in PROCESSES:
        one = euler(GaussianDenoiser(process, 20), process, X, 20)
        assert torch.equal(one, ddim(GaussianDenoiser(process, 20), process, X, 20))


@pytest.mark.parametrize("process", [diffusion(), flow_matching(), edm()])
def test_euler_s_slope_is_that_of_the_ode(process):
    """One step by hand, in the variables that `NoiseProcess.ode` names."""
    states: list[Step] = []
    model = GaussianDenoiser(process, 10)
    euler(model, process, X, 10, on_step=states.append)
    here, there = process.grid(10)[3:5]
    (scale, clock), (scale_there, clock_there) = process.ode(here), process.ode(there)
    before, after = states[2].x, states[3]
    moved = before / scale + (clock_there - clock) * (before / scale - after.x_0) / clock
    torch.testing.assert_close(after.x, scale_there * moved, rtol=1e-9, atol=1e-9)


def test_a_sample_depends_on_its_seed_alone():
    process, seeds = diffusion(), [11, 12, 13, 14]

    def run(chosen: list[int]) -> Tensor:
        x = normal(chosen, (2,), "start")
        return ddpm(GaussianDenoiser(process, 20), process, x, 20, rng=chosen)

    everyone = run(seeds)
    assert torch.equal(run([13, 11]), everyone[[2, 0]])
    assert torch.equal(run(seeds), everyone)
    assert not torch.isclose(everyone[0], everyone[1]).any()


def test_steps_draw_different_noise():
    process, states = diffusion(target="x0"), [X]
    ddpm(lambda x, t: 0 * x, process, X, 5, rng=range(len(X)), on_step=lambda step: states.append(step.x))
    drawn = []
    for (here, there), (before, after) in zip(pairwise(process.grid(5)[:-1]), pairwise(states[:-1]), strict=True):
        step = between(here, there)
        drawn.append((after - step.mean_x_t * before) / step.posterior_variance**0.5)
    assert len(drawn) == 4
    for i, noise in enumerate(drawn):
        torch.testing.assert_close(noise, normal(range(len(X)), (2,), f"sampling step {i}").double())
        assert all((noise - other).abs().mean() > 0.5 for other in drawn[:i])


@pytest.mark.parametrize("process", [diffusion(), flow_matching(), edm()])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_of_another_dtype_leaves_the_state_in_float32(process, name):
    exact_model = GaussianDenoiser(process, 20)
    seen = []

    def model(dtype: torch.dtype, x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return exact_model(x, t).to(dtype)

    x, half = X.float(), partial(model, torch.bfloat16)
    samples = SAMPLERS[name](half, process, x, 20, rng=generator())
    reference = SAMPLERS[name](partial(model, torch.float64), process, x, 20, rng=generator())
    assert (samples - reference).abs().max() < 0.05
    from_half = SAMPLERS[name](half, process, x.bfloat16(), 20, rng=generator())
    assert {samples.dtype, reference.dtype, from_half.dtype, *seen} == {torch.float32}


def test_sampling_keeps_no_graph_and_the_start():
    weight = torch.ones(1, requires_grad=True)
    x = X.clone()
    samples = ddim(lambda x, t: weight * x, diffusion(), x, 3)
    assert not samples.requires_grad
    assert torch.equal(x, X)


def test_static_clipping_bounds_the_samples_and_moves_the_noise_with_them():
    process = diffusion()
    states: list[Step] = []
    wild = lambda x, t: -5 * x  # noqa: E731
    ddim(wild, process, X, 10, clip=Clip(ClipConfig(limit=0.7)), on_step=states.append)
    assert all(state.x_0.abs().max() <= 0.7 for state in states)
    # x = α·x_0 + σ·ε still holds after each step, so the state is that of an image within the bounds.
    there = process.grid(10)[1]
    here = process.grid(10)[0]
    noise = (X - here.alpha * states[0].x_0) / here.sigma
    torch.testing.assert_close(states[0].x, there.alpha * states[0].x_0 + there.sigma * noise)


def test_dynamic_thresholding_is_imagen_s():
    x_0 = torch.tensor([[0.1, -0.5, 0.9, 3.0, -2.0], [0.1, 0.2, -0.3, 0.4, 0.5]], dtype=torch.float64)
    clipped = Clip(ClipConfig(limit=1.0, percentile=0.75))(x_0)
    # |x_0| at the 75th percentile is 2.0 in the first row, and below the limit in the second.
    torch.testing.assert_close(clipped[0], torch.tensor([0.05, -0.25, 0.45, 1.0, -1.0], dtype=torch.float64))
    assert torch.equal(clipped[1], x_0[1])


@pytest.mark.parametrize(
    ("frames", "kept"), [(1, [12]), (4, [3, 6, 9, 12]), (5, [3, 5, 8, 10, 12]), (99, range(1, 13))]
)
def test_a_trajectory_keeps_evenly_spaced_states_and_the_last(frames, kept):
    trajectory, states = Trajectory(frames), []

    def both(step: Step) -> None:
        trajectory(step)
        states.append(step)

    samples = ddim(GaussianDenoiser(flow_matching(), 12), flow_matching(), X, 12, on_step=both)
    assert trajectory.numbers == list(kept)
    assert len(trajectory.x) == len(trajectory.x_0) == len(trajectory.numbers)
    for x, x_0, number in zip(trajectory.x, trajectory.x_0, kept, strict=True):
        assert torch.equal(x, states[number - 1].x)
        assert torch.equal(x_0, states[number - 1].x_0)
    assert torch.equal(trajectory.x[-1], samples)


def test_a_sampler_from_a_config_is_the_function():
    process = diffusion()
    model = GaussianDenoiser(process, 10)
    settings = Sampler(SamplerConfig(name="ddim", steps=10, eta=0.5), clip=Clip(ClipConfig(limit=0.5)))
    expected = ddim(model, process, X, 10, eta=0.5, clip=Clip(ClipConfig(limit=0.5)), rng=generator())
    assert torch.equal(settings(model, process, X, rng=generator()), expected)
    forward = Sampler(SamplerConfig(name="ddpm", steps=10, variance="forward"))(model, process, X, rng=generator())
    assert torch.equal(forward, ddpm(model, process, X, 10, variance="forward", rng=generator()))
    spaced = Sampler(SamplerConfig(name="heun", steps=10, spacing="linspace"))
    linspaced = GaussianDenoiser(process, 10, "linspace")
    assert torch.equal(spaced(linspaced, process, X), heun(linspaced, process, X, 10, spacing="linspace"))


def test_a_sampler_with_a_condition_guides():
    process, condition, null = diffusion(), torch.ones(len(X), 1), -torch.ones(len(X), 1)

    def model(x, t, given):
        return x * given

    guidance = GuidanceConfig(3.0)
    expected = ddim(Guidance(guidance)(model, condition, null), process, X, 5)
    guided = Sampler(SamplerConfig(name="ddim", steps=5, guidance=guidance))(model, process, X, condition, null)
    assert torch.equal(guided, expected)
    unguided = Sampler(SamplerConfig(name="ddim", steps=5))(model, process, X, condition, null)
    assert torch.equal(unguided, ddim(lambda x, t: x, process, X, 5)) and not torch.equal(unguided, expected)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SamplerConfig(name="dpmpp"), "'name' cannot be 'dpmpp'. Did you mean 'dpmpp_2m'?"),
        (lambda: SamplerConfig(spacing="trialing"), "Did you mean 'trailing'?"),
        (lambda: Sampler(SamplerConfig(name="heun", eta=0.5)), "sampler heun has no eta"),
        (lambda: Sampler(SamplerConfig(name="ddim", variance="forward")), "sampler ddim has no variance"),
        (lambda: ClipConfig(limit=0.0), "'limit' must be above 0, not 0.0"),
        (lambda: ClipConfig(limit=1.0, percentile=99.5), "'percentile' must be below 1, not 99.5"),
        (lambda: SamplerConfig(eta=2.0), "'eta' must be at most 1, not 2.0"),
        (lambda: SamplerConfig(name="ddpm", variance="fixed"), "'variance' cannot be 'fixed'."),
        (lambda: ddim(lambda x, t: x, diffusion(), X, 2000), "steps=2000 must lie in 1 … 1000"),
    ],
)
def test_a_wrong_setting_is_named(make, says):
    with pytest.raises(ConfigError) as error:
        make()
    assert says in str(error.value)


def test_each_sampler_has_a_function():
    assert tuple(SAMPLERS) == choices(SamplerConfig, "name")


def test_noise_needs_a_key():
    with pytest.raises(ValueError, match="needs rng"):
        ddpm(GaussianDenoiser(diffusion(), 5), diffusion(), X, 5)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("process", [diffusion("scaled_linear", target="v"), flow_matching(), edm()])
def test_samples_start_from_others_at_a_level_in_between(name, process):
    steps, skipped, others = 10, 6, MEAN + 0.1 * X.flip(0)
    denoiser, seen = GaussianDenoiser(process, steps), []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t[0].item()))
        return denoiser(x, t)

    found = SAMPLERS[name](model, process, X, steps, rng=generator(), source=Source(others, skipped))
    level = process.grid(steps)[skipped]
    state, time = seen[0]
    assert time == process.model_time(torch.tensor(level.time)).item()
    assert torch.equal(state, level.alpha * others + level.sigma * X)
    assert len({t for _, t in seen}) == steps - skipped
    if name in ("ddim", "euler", "heun"):
        # A run from noise through the same state ends at the same samples.
        whole = Trajectory(steps)
        end = SAMPLERS[name](denoiser, process, X, steps, on_step=whole)
        x_0 = (whole.x[skipped - 1] - level.sigma * X) / level.alpha
        again = SAMPLERS[name](denoiser, process, X, steps, source=Source(x_0, skipped))
        torch.testing.assert_close(again, end, rtol=1e-9, atol=1e-9)
    assert (found - others).abs().mean() < (X - others).abs().mean()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("skipped", [0, 6])
def test_a_mask_keeps_samples_at_each_step(name, skipped):
    process, steps = diffusion("scaled_linear", target="v"), 10
    kept, mask = 5 + X, torch.tensor([1.0, 0.0])
    states = Trajectory(steps)
    source = Source(kept, skipped, mask)
    found = SAMPLERS[name](
        GaussianDenoiser(process, steps), process, X, steps, rng=generator(), source=source, on_step=states
    )
    assert torch.equal(found[:, 1], kept[:, 1])
    for level, x in zip(process.grid(steps)[skipped + 1 :], states.x, strict=True):
        assert torch.equal(x[:, 1], (level.alpha * kept + level.sigma * X)[:, 1])
    free = SAMPLERS[name](GaussianDenoiser(process, steps), process, X, steps, rng=generator())
    if skipped == 0:
        assert torch.equal(found[:, 0], free[:, 0]), "it starts as noise, and this denoiser looks at each value alone"
    else:
        assert (found[:, 0] - free[:, 0]).abs().mean() > 0.05
