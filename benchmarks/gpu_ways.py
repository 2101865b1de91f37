"""Ways to take the same training steps, measured in turn in one process."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmlab.model import compiled_layers

CHECKED, WARM = 3, 2
"""First steps of a way: those that are compared, without an update of the weights, and those after them."""
PEAK = {"H200": 790e12}
"""FLOP/s that products of bf16 matrices reach on a GPU; on others they are measured."""


@dataclass
class Way:
    """A way to take the training steps of a case.

    Attributes:
        name: for the table.
        step: forward and backward pass on a batch, given its number; returns the mean loss.
        module: whose memory counts.
        compared: weights whose gradients have the same norm in all ways.
        optimizer: of the trained weights; ways may share it with them.
        enter: prepares the modules that ways share.
        flops: of a step, where it does not do the case's work on each batch.
    """

    name: str
    step: Callable[[int], Tensor]
    module: nn.Module
    compared: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    enter: Callable[[], None] = lambda: None
    flops: float | None = None


@dataclass
class Case:
    """Steps on the same batches with the same first weights.

    Attributes:
        unit: of `amounts`, in the plural.
        amounts: of each batch, without padding and repetition.
        flops: model FLOPs of each batch, likewise.
        ways: the first one is the baseline.
        tolerance: relative, of losses; gradient norms may differ by ten times as much.
    """

    unit: str
    amounts: list[float]
    flops: list[float]
    ways: list[Way]
    tolerance: float


class Compiled:
    """Layers that run compiled while it is `on`, each by itself, as torch does by default.

    Args:
        layers: of one model.
    """

    def __init__(self, layers: Iterable[nn.Module]):
        self.layers, self.calls = list(layers), []

    @property
    def on(self) -> bool:
        return bool(self.calls) and self.layers[0]._compiled_call_impl is not None

    @on.setter
    def on(self, value: bool) -> None:
        if value and not self.calls:
            for layer in self.layers:
                layer.compile(backend=compiled_layers.BACKEND)
                self.calls.append(layer._compiled_call_impl)
        for layer, call in zip(self.layers, self.calls, strict=bool(self.calls)):
            layer._compiled_call_impl = call if value else None


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(way: Way, batch: int, update: bool = True) -> tuple[float, float, float]:
    """Take a step: its seconds, its loss, and the norm of the gradients (0 where the weights are updated)."""
    way.enter()
    synchronize()
    start, norm = time.perf_counter(), 0.0
    loss = way.step(batch)
    if update:
        way.optimizer.step()
    else:
        norm = float(torch.nn.utils.get_total_norm([w.grad for w in way.compared if w.grad is not None]))
    synchronize()
    seconds = time.perf_counter() - start
    for weight in way.module.parameters():
        weight.grad = None
    return seconds, float(loss), norm


def first_steps(way: Way, batches: int) -> dict[str, Any]:
    """Losses and gradients at the first weights of the case, the time of the first step, and memory."""
    checked = [run(way, n % batches, update=False) for n in range(CHECKED)]
    row: dict[str, Any] = {
        "first_step_s": checked[0][0],
        "losses": [loss for _, loss, _ in checked],
        "gradient_norms": [norm for _, _, norm in checked],
    }
    return row


def warm(way: Way, batches: int) -> dict[str, Any]:
    """Steps with updates; returns the peak memory of the way alone on a GPU: its weights, optimizer, and a step."""
    for n in range(WARM - 1):
        run(way, n % batches)
    if not torch.cuda.is_available():
        run(way, 0)
        return {}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(way, 0)
    own = total(way.module.parameters()) + sum(
        total(value for value in state.values() if isinstance(value, Tensor)) for state in way.optimizer.state.values()
    )
    return {"memory_gib": (torch.cuda.max_memory_allocated() - before + own) / 2**30}


def total(tensors: Iterable[Tensor]) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def differs(row: dict[str, Any], first: dict[str, Any], tolerance: float) -> str | None:
    """What of the first steps differs from the baseline's, if anything."""
    for name, share in (("losses", tolerance), ("gradient_norms", 10 * tolerance)):
        for here, there in zip(row[name], first[name], strict=True):
            if not abs(here - there) <= share * abs(there):
                return f"{name.replace('_', ' ')} differ: {here:.6g}, baseline {there:.6g}"
    return None


def measure(case: Case, until: float, rounds: int, peaks: dict[str, float], note: Callable[[Any], None]) -> None:
    """Compare the first steps of all ways, then time those that agree, in turn.

    Args:
        case: what to measure.
        until: when to stop, by `time.monotonic`; two thirds of the time until then are for the first steps.
        rounds: steps of each way, at most.
        peaks: name → FLOP/s, of which the shares are stated.
        note: is called with the rows so far.
    """
    rows: list[dict[str, Any]] = [{"way": way.name} for way in case.ways]
    begun, ready, batches = time.monotonic(), [], len(case.amounts)
    # All ways start from the same weights, so no weight is updated before the last first step.
    for way, row in zip(case.ways, rows, strict=True):
        try:
            if time.monotonic() > begun + (until - begun) * 2 / 3:
                row["skipped"] = "no time left"
                continue
            row |= first_steps(way, batches)
            agreed = next((other for other in rows if "agrees" in other), row)
            if (reason := differs(row, agreed, case.tolerance)) is None:
                row["agrees"] = True
                ready.append((way, row))
            else:
                row["skipped"] = reason
        except Exception as error:  # whatever a way cannot do here, the others are measured
            row["skipped"] = reason_of(error)
        clear(way)
        note(rows)
    seconds: dict[str, list[float]] = {}
    for way, row in list(ready):
        try:
            row |= warm(way, batches)
            seconds[way.name] = []
        except Exception as error:
            row["skipped"] = reason_of(error)
            ready.remove((way, row))
            clear(way)
    for n in range(rounds):
        if time.monotonic() > until and n:
            break
        for way, _ in ready:
            seconds[way.name].append(run(way, n % batches)[0])
    for way, row in ready:
        row |= figures(case, way, seconds[way.name], peaks)
    if ready:
        base = ready[0][1]["per_s"]
        for _, row in ready:
            row["ratio"] = row["per_s"] / base
    note(rows)


def clear(way: Way) -> None:
    """Free what a step has left, also one that has failed."""
    for weight in way.module.parameters():
        weight.grad = None
    free()


def reason_of(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def figures(case: Case, way: Way, seconds: list[float], peaks: dict[str, float]) -> dict[str, Any]:
    def of_each(amounts: list[float]) -> list[float]:
        return [amounts[n % len(amounts)] / second for n, second in enumerate(seconds)]

    rates = of_each(case.amounts)
    flops = statistics.median(of_each(case.flops if way.flops is None else [way.flops]))
    return {
        "rounds": len(seconds),
        "ms": statistics.median(seconds) * 1000,
        "ms_min": min(seconds) * 1000,
        "per_s": statistics.median(rates),
        "tflop_per_s": flops / 1e12,
        **{f"mfu_{name}": flops / peak for name, peak in peaks.items()},
    }


def product_peak(device: torch.device) -> float:
    """FLOP/s of the product of two square bf16 matrices."""
    side = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(10):
        synchronize()
        start = time.perf_counter()
        for _ in range(5):
            torch.mm(a, b)
        synchronize()
        best = max(best, 5 * 2 * side**3 / (time.perf_counter() - start))
    return best
