"""What is alive at the peak: against torch's own tracker, with masks, and with storages that FSDP would free."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from mmlab.training.live_memory import LiveMemory


def layers() -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))


def run(model: nn.ModuleList, recompute: bool) -> None:
    x = torch.zeros(512, 64, requires_grad=True)
    for layer in model:
        x = x + (checkpoint(layer, x, use_reentrant=False) if recompute else layer(x))
    x.square().mean().backward()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_peak_is_that_of_torchs_tracker(recompute):
    with FakeTensorMode():
        model, live = layers(), LiveMemory()
        with live:
            run(model, recompute)
        model = layers()
        theirs = MemTracker()
        with theirs:
            run(model, recompute)
    assert live.peak == pytest.approx(theirs.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"], rel=0.02)
    assert (live.peak < 4e6) == recompute


def test_what_has_ended_is_not_alive():
    with FakeTensorMode(), LiveMemory() as live:
        x = torch.zeros(1000)
        for _ in range(5):
            x = x + 1
        assert live.now == 4000 and live.peak == 8000
        del x
        assert live.now == 0
        live.restart()
        assert live.peak == 0


def test_a_mask_selects_the_stated_number():
    with FakeTensorMode(), LiveMemory(selected=7):
        x, mask = torch.zeros(4, 16, 3, requires_grad=True), torch.zeros(4, 16, dtype=torch.bool)
        chosen = x[mask]
        assert chosen.shape == (7, 3)
        chosen.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
        assert not (x == 1).all() and int(torch.ones(2).sum()) == 1


def test_freed_storages_do_not_count():
    with FakeTensorMode(), LiveMemory() as live:
        x = torch.zeros(1000)
        x.untyped_storage().resize_(0)
        assert live.now == 0
        x.untyped_storage().resize_(4000)
        assert live.now == 4000
