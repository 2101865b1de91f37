"""The cases of benchmarks/gpu.sh, with tiny models on a CPU."""

import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from mmlab.training.flops import FlopCounter

MODULES = ("gpu_ways", "gpu_conversations", "gpu_llava", "gpu_diffusion")
CPU = torch.device("cpu")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "benchmarks"), *sys.path])
    yield {name: import_module(name) for name in MODULES}
    for name in MODULES:
        del sys.modules[name]


def measured(benchmark, case):
    """Rows of the ways that are not compiled."""
    case.ways = [way for way in case.ways if "compiled" not in way.name]
    noted = []
    benchmark["gpu_ways"].measure(case, time.monotonic() + 600, 1, {"measured": 1e12}, noted.append)
    return noted[-1]


@pytest.mark.parametrize(("kind", "recipe"), [("caption", "v15_7b_align"), ("questions", "v15_7b_finetune")])
def test_all_ways_of_llava_agree(benchmark, kind, recipe):
    size = benchmark["gpu_conversations"].TINY
    rows = measured(benchmark, benchmark["gpu_llava"].llava(kind, f"llava/{recipe}", size, CPU))
    assert len(rows) == (3 if kind == "questions" else 4)
    assert not [row for row in rows if "skipped" in row]
    assert all(row["rounds"] == 1 and row["mfu_measured"] > 0 for row in rows)


@pytest.mark.parametrize("recipe", ["v15_7b_align", "v15_7b_finetune"])
def test_flops_of_llava_are_those_that_are_counted(benchmark, recipe):
    """One conversation, whose loss is at all positions that it is counted at, in a row without padding."""
    conversations, llava = benchmark["gpu_conversations"], benchmark["gpu_llava"]
    size = conversations.TINY
    sides = llava.Sides("conversation", f"llava/{recipe}", size, CPU)
    model, rows = sides.model, [[sides.rows[0][0][0]]]
    pixels = sides.batches[0]["pixel_values"][:1]
    batch = conversations.our_batch(rows, pixels, model.tokens_per_image, len(rows[0][0]))
    counter = FlopCounter()
    with counter:
        total, _ = sides.stage.loss(sides.stage.on_before_batch_transfer(batch, 0))
        counter.in_backward = True
        total.backward()
    assert llava.model_flops(model, rows, sides.trained) == pytest.approx(counter.flops, rel=0.01)


def test_all_ways_of_diffusion_models_agree(benchmark):
    diffusion = benchmark["gpu_diffusion"]
    for case in (diffusion.dit(diffusion.TINY_DIT, CPU), diffusion.unet(diffusion.TINY_UNET, CPU)):
        rows = measured(benchmark, case)
        assert not [row for row in rows if "skipped" in row]


def test_a_way_that_differs_or_fails_is_not_timed(benchmark):
    ways = benchmark["gpu_ways"]
    weight = torch.nn.Parameter(torch.ones(3))
    module = torch.nn.ParameterList([weight])
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def way(name, factor, error=None):
        def step(n):
            if error:
                raise error
            loss = factor * weight.square().sum()
            loss.backward()
            return loss.detach()

        return ways.Way(name, step, module, [weight], optimizer)

    full = torch.OutOfMemoryError("1 GiB")
    case = ways.Case("samples", [2.0], [8.0], [way("a", 1.0), way("b", 1.1), way("c", 1.0, full), way("d", 1.0)], 1e-3)
    rows = []
    ways.measure(case, time.monotonic() + 600, 2, {}, rows.append)
    assert [row.get("skipped", "timed").split(":")[0] for row in rows[-1]] == [
        "timed",
        "losses differ",
        "out of memory",
        "timed",
    ]
    assert "ratio" in rows[-1][3]
