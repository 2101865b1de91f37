"""Keyed randomness: a function of each sample's seed, whatever the batch, rank or process."""

import subprocess
import sys

import pytest
import torch

from mmlab.diffusion.config import DiffusionConfig, EDMConfig, FlowMatchingConfig
from mmlab.diffusion.edm import EDM
from mmlab.diffusion.flow import FlowMatching
from mmlab.diffusion.process import Diffusion
from mmlab.keyed import normal, uniform

SEEDS = [5, 2**40 + 5, 2**62, 0, 17, 123456789]


@pytest.mark.parametrize(
    "process",
    [Diffusion(DiffusionConfig()), FlowMatching(FlowMatchingConfig(density="logit_normal")), EDM(EDMConfig())],
)
def test_a_draw_depends_only_on_its_seed(process):
    times, noise = process.draw(SEEDS, (3, 4))
    assert (times.shape, noise.shape, noise.dtype) == ((6,), (6, 3, 4), torch.float32)
    # One rank with six samples, or two with three, in another order, or after a restart: the same draws.
    for part in ([0, 1, 2], [3, 4, 5], [5, 0, 3], [4]):
        again_times, again_noise = process.draw(torch.tensor([SEEDS[i] for i in part]), (3, 4))
        assert torch.equal(again_times, times[part])
        assert torch.equal(again_noise, noise[part])


def test_another_process_draws_the_same():
    code = "from mmlab.keyed import normal; print(normal([1, 2**50], (3,), 'noise').tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(normal([1, 2**50], (3,), "noise").tolist())


def test_the_numbers_stay_the_same_in_later_versions():
    """Frozen values: a change of them would change every run that is resumed across versions."""
    even = [0.44151524745146586, 0.20758652343083017, 0.7906162475361209]
    assert uniform([0, 1, 2**63 - 1], "timestep").tolist() == pytest.approx(even, abs=1e-15)
    noise = [0.6716539859771729, -0.7751670479774475, 0.5838320851325989, -1.2425036430358887]
    assert normal([0, 2**63 - 1], (2,), "noise").flatten().tolist() == pytest.approx(noise, abs=1e-6)


def test_seeds_that_agree_in_32_bits_draw_differently():
    """torch's own CPU generator would give both samples the same noise."""
    low, high = 5, 2**40 + 5
    twins = [torch.randn(16, generator=torch.Generator().manual_seed(seed)) for seed in (low, high)]
    assert torch.equal(*twins)
    ours = normal([low, high], (16,), "noise")
    assert not torch.isclose(ours[0], ours[1]).any()


def test_many_seeds_give_standard_normal_and_independent_numbers():
    noise = normal(range(4000), (8,), "noise").double()
    assert noise.unique().numel() > 0.99 * noise.numel()
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    correlation = torch.corrcoef(noise.T) - torch.eye(8)
    assert correlation.abs().max() < 0.06
    assert abs(torch.corrcoef(torch.stack([noise[:-1, 0], noise[1:, 0]]))[0, 1]) < 0.06
    even = uniform(range(4000), "timestep")
    assert 0 <= even.min() < 0.002 < 0.998 < even.max() < 1
    assert abs(even.mean() - 0.5) < 0.02
    # The timestep says nothing of the noise, nor does noise for another purpose.
    other = normal(range(4000), (8,), "start").double()
    for pair in ((even, noise[:, 0]), (noise[:, 0], other[:, 0])):
        assert abs(torch.corrcoef(torch.stack(pair))[0, 1]) < 0.06
