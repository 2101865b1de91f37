"""Which timesteps samplers visit."""

import pytest
import torch
from diffusers import DDIMScheduler

from mmlab.config.errors import ConfigError
from mmlab.diffusion.flow import FlowMatching
from mmlab.diffusion.process import Diffusion
from mmlab.diffusion.schedule import SPACINGS, spaced


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
    """Diffusers rounds the stride: 600 of 1000 steps start at 599, where a sixth of the picture is still there."""
    theirs = DDIMScheduler()
    theirs.set_timesteps(600)
    assert theirs.timesteps[0] == 599
    assert Diffusion().level(torch.tensor(599)).alpha > 0.15
    assert spaced(1000, 600, "leading")[0] == 998


def test_one_step_starts_at_the_noisiest_timestep():
    assert spaced(1000, 1, "linspace") == spaced(1000, 1, "trailing") == [999]


def test_a_grid_ends_clean():
    for process in (Diffusion(), FlowMatching()):
        grid = process.grid(7)
        assert len(grid) == 8
        assert grid[-1][1:] == (1.0, 0.0)
        assert [level.sigma for level in grid] == sorted((level.sigma for level in grid), reverse=True)


def test_zero_terminal_snr_starts_from_noise_alone():
    process = Diffusion(zero_terminal_snr=True, target="v")
    for spacing in ("trailing", "linspace"):
        assert process.grid(20, spacing)[0][1:] == (0.0, 1.0)
    assert len(process.grid(1000, "leading")) == 1001
    with pytest.raises(ConfigError, match="starts at timestep 950, but a model with zero_terminal_snr"):
        process.grid(20, "leading")


def test_shift_moves_the_flow_towards_noise():
    times = [level.time for level in FlowMatching(shift=3.0).grid(4)]
    assert times == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((1000, 0, "trailing"), "steps=0 must lie in 1 … 1000"),
        ((10, 11, "trailing"), "steps=11 must lie in 1 … 10"),
        ((10, 5, "trialing"), "Did you mean 'trailing'?"),
    ],
)
def test_a_wrong_grid_is_refused(arguments, says):
    with pytest.raises(ConfigError) as error:
        spaced(*arguments)
    assert says in str(error.value)


def test_the_flow_takes_one_spacing():
    with pytest.raises(ConfigError, match="flow matching takes spacing=trailing"):
        FlowMatching().grid(5, "leading")
