"""Counted model FLOPs against formulas, and training that does not change by counting."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmlab.training import flops
from mmlab.training.flops import BatchFlops, FlopCounter

B, T, WIDTH, HEADS, LAYERS = 2, 6, 16, 2, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BTD).view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x_BTD + self.out(mixed.transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.recompute = recompute

    def forward(self, x_BTD: Tensor) -> Tensor:
        for block in self.blocks:
            x_BTD = checkpoint(block, x_BTD, use_reentrant=False) if self.recompute else block(x_BTD)  # type: ignore[assignment]
        return x_BTD.square().sum()


def counted(net: Callable[[Tensor], Tensor], learns: bool = True) -> int:
    """FLOPs of a step on an input that needs no gradient."""
    with FlopCounter() as counter:
        loss = net(torch.randn(B, T, WIDTH, generator=torch.Generator().manual_seed(0)))
        counter.in_backward = True
        if learns:
            loss.backward()
    return counter.flops


WEIGHTS, SCORES = B * T * 4 * WIDTH**2, 2 * B * T**2 * WIDTH  # multiplications of a block's layers and attention


def test_a_step_has_the_flops_of_its_formula():
    """6 per weight and token, 12 per layer, width and pair of tokens (PaLM, appendix B)."""
    first_input = 2 * B * T * 3 * WIDTH**2  # needs no gradient
    assert counted(Net()) == 6 * LAYERS * (WEIGHTS + SCORES) - first_input


def test_frozen_layers_have_no_gradients_of_weights():
    net = Net()
    net.blocks[2].requires_grad_(False)
    net.blocks[0].requires_grad_(False)
    forward = 2 * LAYERS * (WEIGHTS + SCORES)
    first_input = 2 * B * T * 3 * WIDTH**2
    assert counted(net) == forward + (4 * WEIGHTS + 4 * SCORES - first_input) + (2 * WEIGHTS + 4 * SCORES)
    with torch.no_grad():
        assert counted(net, learns=False) == forward


def test_recomputation_does_not_count():
    assert counted(Net(recompute=True)) == counted(Net())


def test_convolutions_count():
    net = nn.Sequential(nn.Conv1d(T, 5, 3, padding=1), nn.Conv1d(5, 4, 1))
    products = B * WIDTH * (T * 5 * 3 * 2 + 5 * 4 * 3)
    assert counted(lambda x: net(x).sum()) == 2 * products


@pytest.fixture
def four_ranks():
    """The first of four ranks, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_sharded_model_has_the_flops_of_the_whole_one(four_ranks, recompute):
    net = Net(recompute)
    for block in net.blocks:
        fully_shard(block)
    fully_shard(net)
    assert counted(net) == counted(Net())


def test_counting_changes_no_bit():
    gradients = []
    for counter in (torch.enable_grad(), FlopCounter()):
        net = Net(recompute=True)
        with counter, torch.autocast("cpu", torch.bfloat16):
            net(torch.randn(B, T, WIDTH, generator=torch.Generator().manual_seed(0))).backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def work(batches: BatchFlops, rows: int, width: int, *more: int) -> float:
    """FLOPs of a micro-batch of one product."""
    batches.begin((rows * width, width, *more))
    torch.mm(torch.ones(rows, width), torch.ones(width, 2))
    return batches.end()


def test_a_shape_is_counted_once(monkeypatch):
    batches = BatchFlops()
    assert work(batches, 3, 5) == 2 * 3 * 5 * 2
    made = []
    monkeypatch.setattr(flops, "FlopCounter", lambda: made.append(1) or FlopCounter())
    assert work(batches, 3, 5) == 60 and not made
    assert work(batches, 4, 5) == 80 and made
    assert work(batches, 4, 5, 1) == 80 and len(made) == 2


def test_the_flops_of_many_shapes_are_estimated(monkeypatch):
    monkeypatch.setattr(flops, "COUNTED_SHAPES", 2)
    batches = BatchFlops()
    work(batches, 3, 5)
    work(batches, 3, 50)
    assert work(batches, 3, 45) == pytest.approx(2 * 3 * 45 * 2)
    assert len(batches.counted) == 2


def test_an_error_ends_the_counting():
    batches = BatchFlops()
    batches.begin((1,))
    batches.stop()
    torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    assert not batches.counted
    batches.stop()


def test_compiled_code_runs_as_compiled():
    """Uncompiled, FlexAttention would make all scores."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    left, right = torch.ones(3, 4), torch.ones(4, 5)
    with FlopCounter() as counter:
        torch.compile(torch.mm, backend=backend)(left, right)
    assert len(graphs) == 1 and counter.flops == 2 * 3 * 4 * 5


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_count_the_same(recompute):
    """A compiled layer that runs again in the backward pass does not count again."""
    net = Net(recompute)
    for block in net.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager")  # type: ignore[method-assign]
    assert counted(net) == counted(Net())


def test_attention_that_compiled_code_checkpoints_counts_once():
    """It runs through an operator that saves the random state. Layers of diffusers are checkpointed so."""

    def attend(x: Tensor) -> Tensor:
        attended = checkpoint(lambda y: F.scaled_dot_product_attention(y, y, y).sin(), x, use_reentrant=False)
        return attended.square().sum()  # type: ignore[union-attr]

    counts = []
    for function in (attend, torch.compile(attend, backend="aot_eager")):
        with FlopCounter() as counter:
            out = function(torch.randn(1, 2, 8, 4, requires_grad=True))
            counter.in_backward = True
            out.backward()
        counts.append(counter.flops)
    assert counts[0] == counts[1] > 0
