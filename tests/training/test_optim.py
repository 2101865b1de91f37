import copy
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from mmlab.config.errors import ConfigError
from mmlab.training.config import AdamWConfig
from mmlab.training.optim import AdamW, StochasticAdamW, gradients_of, stochastically_rounded, total_norm


def model() -> Any:
    parts = {"vision": nn.Linear(2, 2), "connector": nn.Linear(2, 2), "language": nn.Linear(2, 2)}
    built = nn.ModuleDict(parts)
    built["vision"].requires_grad_(False)
    return built


@pytest.mark.parametrize(
    ("schedule", "half", "last"),
    [("cosine", 0.5 * 1.1, 0.1), ("linear", 0.5 * 1.1, 0.1), ("constant", 1.0, 1.0)],
)
def test_schedules_at_warm_up_peak_half_and_end(schedule, half, last):
    optim = AdamW(AdamWConfig(lr=2e-3, schedule=schedule, warmup_ratio=0.1, min_lr=2e-4))
    at = {step: optim.factor(step, 100, 2e-3) for step in range(101)}
    assert [at[step] for step in (0, 4, 9)] == pytest.approx([1 / 11, 5 / 11, 10 / 11])
    assert at[10] == 1.0 == max(at.values())
    assert at[55] == pytest.approx(half)
    assert at[100] == pytest.approx(last)
    falling = [at[step] for step in range(10, 101)]
    assert falling == sorted(falling, reverse=True)


def test_cosine_is_a_cosine_and_linear_a_line():
    for schedule, quarter in (("cosine", (1 + 2**-0.5) / 2), ("linear", 0.75)):
        optim = AdamW(AdamWConfig(lr=1.0, schedule=schedule, warmup_ratio=0))
        assert optim.factor(25, 100, 1.0) == pytest.approx(quarter)
        assert (optim.factor(0, 100, 1.0), optim.factor(100, 100, 1.0)) == pytest.approx((1.0, 0.0))


def test_short_runs_have_a_peak():
    for total in (1, 2, 3):
        optim = AdamW(AdamWConfig(lr=1.0, warmup_ratio=0.03))
        rates = [optim.factor(step, total, 1.0) for step in range(total)]
        assert all(0 < rate <= 1 for rate in rates), rates


def test_the_optimizer_follows_the_schedule():
    built = AdamW(AdamWConfig(lr=1e-2, warmup_ratio=0.2)).build(model(), 10)
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    assert built["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert rates[6] == pytest.approx(0.5e-2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_single_parts_have_a_learning_rate_of_their_own():
    optim = AdamW(AdamWConfig(lr=1e-3, part_lr={"connector": 2e-5}, warmup_ratio=0, min_lr=1e-5))
    net = model()
    built = optim.build(net, 4)
    rate = {id(p): group["initial_lr"] for group in built["optimizer"].param_groups for p in group["params"]}
    assert {rate[id(p)] for p in net["connector"].parameters()} == {2e-5}
    assert {rate[id(p)] for p in net["language"].parameters()} == {1e-3}
    assert not rate.keys() & {id(p) for p in net["vision"].parameters()}, "frozen parts are not optimised"
    for _ in range(4):
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()
    ends = [group["lr"] for group in built["optimizer"].param_groups]
    assert ends == pytest.approx([1e-5] * len(ends)), "both come down to min_lr"


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("conector", "names 'conector', which is not trained. Did you mean 'connector'"),
        ("vision", "names 'vision', which is not trained"),
    ],
)
def test_a_rate_for_what_does_not_learn_is_refused(part, says):
    with pytest.raises(ConfigError, match=says):
        AdamW(AdamWConfig(lr=1e-3, part_lr={part: 1e-4})).build(model(), 4)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ConfigError, match=r"'schedule' cannot be 'cosin'. Did you mean 'cosine'"):
        AdamWConfig(schedule="cosin")


def test_weight_decay_is_on_matrices_alone():
    net = model()
    optimizer: torch.optim.Optimizer = AdamW(AdamWConfig(lr=1e-3, weight_decay=0.1)).build(net, 4)["optimizer"]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for part in ("connector", "language"):
        assert (decay[id(net[part].weight)], decay[id(net[part].bias)]) == (0.1, 0.0)


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


def test_on_a_cpu_one_kernel_computes_the_steps_of_torchs_adamw():
    torch.manual_seed(0)
    ours, theirs = model(), model()
    theirs.load_state_dict(ours.state_dict())
    optimizer = AdamW(AdamWConfig(lr=1e-2, warmup_ratio=0, schedule="constant")).build(ours, 5)["optimizer"]
    peer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], 1e-2, weight_decay=0, foreach=False)
    assert optimizer.param_groups[0]["fused"]
    for _ in range(5):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            if a.requires_grad:
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
        optimizer.step()
        peer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_resumed_run_computes_its_steps_as_before():
    earlier = torch.optim.AdamW(model().parameters(), lr=1e-2, foreach=True)
    whole = model().requires_grad_(True)
    optimizer = AdamW(AdamWConfig(lr=1e-2)).build(whole, 5)["optimizer"]
    (group,) = earlier.state_dict()["param_groups"]
    rows = optimizer.state_dict()["param_groups"]
    stored = [{**group, "params": row["params"], "initial_lr": 1e-2} for row in rows]
    optimizer.load_state_dict({"state": {}, "param_groups": stored})
    assert {(group["foreach"], group["fused"]) for group in optimizer.param_groups} == {(True, None)}


def test_gradients_can_be_clipped_under_mixed_precision():
    parts = model()
    optimizer = AdamW(AdamWConfig(lr=1e-2)).build(parts, 10)["optimizer"]
    for weight in parts.parameters():
        weight.grad = torch.full_like(weight, 3.0) if weight.requires_grad else None
    MixedPrecision("bf16-mixed", "cpu").clip_gradients(optimizer, 1.0)
    assert total_norm(gradients_of(optimizer)) == pytest.approx(1, rel=1e-4)
