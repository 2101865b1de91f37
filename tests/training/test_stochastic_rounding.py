"""AdamW on bfloat16 weights beside torch's on float32 ones. Legend: N weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from mmlab.training.config import AdamWConfig
from mmlab.training.optim import AdamW, StochasticAdamW, stochastically_rounded

LLAVA = 2e-5
"""The learning rate of LLaVA's finetuning, far below the last bit of a weight of 0.02."""


def weights(dtype: torch.dtype) -> nn.Parameter:
    start = torch.randn(4_096, generator=torch.Generator().manual_seed(0)) * 0.02
    return nn.Parameter(start.bfloat16().to(dtype))


def gradient(step: int) -> Tensor:
    """Of one sign for each weight, and noisy, as early in a finetuning."""
    sign = torch.randn(4_096, generator=torch.Generator().manual_seed(1)).sign()
    return 1e-3 * (sign + torch.randn(4_096, generator=torch.Generator().manual_seed(10 + step)))


def moved(optimizer: type[torch.optim.Optimizer], dtype: torch.dtype, steps: int = 200) -> Tensor:
    """How far the weights went, float32 `[N]`."""
    parameter = weights(dtype)
    start = parameter.detach().float().clone()
    built = optimizer([parameter], lr=LLAVA)  # type: ignore[call-arg]
    for step in range(steps):
        parameter.grad = gradient(step).to(dtype)
        built.step()
    return parameter.detach().float() - start


def test_rounding_is_right_on_average_and_to_a_neighbour():
    exact = torch.tensor([0.02, 1.0001, -3.14159, 1e-30, 0.0])
    chance = torch.Generator().manual_seed(0)
    drawn = torch.stack([stochastically_rounded(exact, chance).double() for _ in range(20_000)])
    gap = 2.0 ** (exact.abs().clamp_min(1e-38).log2().floor() - 7)
    assert ((drawn - exact).abs() <= gap).all()
    assert ((drawn.mean(0) - exact).abs() <= 5 * gap / 2 / 20_000**0.5).all()


def test_what_is_not_finite_stays_so():
    found = stochastically_rounded(torch.tensor([float("inf"), -float("inf"), float("nan")]), torch.Generator())
    assert found[0] == float("inf") and found[1] == -float("inf") and found[2].isnan()


def test_small_steps_are_not_lost_in_bfloat16():
    exact = moved(torch.optim.AdamW, torch.float32)
    similarity = nn.functional.cosine_similarity
    assert similarity(moved(StochasticAdamW, torch.bfloat16), exact, dim=0) > 0.95
    nearest = moved(torch.optim.AdamW, torch.bfloat16)
    assert similarity(nearest, exact, dim=0) < 0.7 and (nearest == 0).float().mean() > 0.5


def test_the_second_moment_falls():
    parameter = nn.Parameter(torch.zeros(4_096, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([parameter], lr=0.0)
    for step in range(1_500):
        parameter.grad = torch.full_like(parameter, 1.0 if step == 0 else 0.0)
        optimizer.step()
    expected = 1e-3 * 0.999**1_499
    assert optimizer.state[parameter]["exp_avg_sq"].float().mean().item() == pytest.approx(expected, rel=0.02)


def test_float32_weights_learn_as_with_torch():
    ours, theirs = moved(StochasticAdamW, torch.float32), moved(torch.optim.AdamW, torch.float32)
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_ranks_round_alike_and_a_resumed_run_goes_on_alike():
    first, second = weights(torch.bfloat16), weights(torch.bfloat16)
    unbroken, other = StochasticAdamW([first], lr=LLAVA), StochasticAdamW([second], lr=LLAVA)
    for step in range(12):
        if step == 6:
            saved = copy.deepcopy(other.state_dict())
            other = StochasticAdamW([second], lr=LLAVA)
            other.load_state_dict(saved)
            torch.manual_seed(step)  # another process draws other numbers
        for parameter, optimizer in ((first, unbroken), (second, other)):
            parameter.grad = gradient(step).bfloat16()
            optimizer.step()
    assert torch.equal(first, second)


def test_it_is_taken_where_weights_are_bfloat16():
    model = nn.Linear(4, 4)
    assert type(AdamW(AdamWConfig(lr=1e-3)).build(model, 10)["optimizer"]) is torch.optim.AdamW
    assert type(AdamW(AdamWConfig(lr=1e-3)).build(model.bfloat16(), 10)["optimizer"]) is StochasticAdamW
