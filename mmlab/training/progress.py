"""A run's progress: a bar on a terminal, plain lines elsewhere; speed, data wait and memory go to the logger."""

import resource
import sys
import time
from collections import deque
from dataclasses import dataclass, fields
from typing import Any

import torch
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from mmlab.training.config import ProgressConfig
from mmlab.training.flops import BatchFlops
from mmlab.training.gpus import gpu_named
from mmlab.training.step_callback import StepCallback


@dataclass
class Work:
    """What this rank did in some time."""

    wait: float = 0.0  # seconds without data
    samples: int = 0
    tokens: int = 0  # without padding
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Work)))


class Progress(StepCallback, ProgressBar):
    """Shows loss, samples/s and the share of time spent waiting for data, per optimizer step.

    Logs them, and per step:
        perf/tokens_per_s: tokens of all ranks, without padding, if the data have tokens: this rank's, times the number
            of ranks.
        perf/mfu: model FLOPs of this rank, see `flops`, over what its device computes in the same time at its peak
            rate; waiting for data counts as time. Only if the peak is known.
        perf/memory_gib: peak memory so far: allocated by torch on a GPU, otherwise resident in the process, including
            mapped files.

    Args:
        config: settings.
    """

    def __init__(self, config: ProgressConfig):
        super().__init__()
        self.config = config
        self.enabled = True
        self.bar: tqdm | None = None
        self.paused: float | None = None
        # Ends of recent steps and what was done in them, for a speed over the last steps.
        self.recent: deque[tuple[float, Work]] = deque(maxlen=50)
        self.flops = BatchFlops()
        self.peak: float | None = None

    def enable(self) -> None:
        self.enabled = True

    def disable(self) -> None:
        """Lightning calls this on every rank but the first."""
        self.enabled = False

    def on_train_start(self, trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        self.ended = time.perf_counter()
        self.started = self.ended
        self.work = Work()
        self.paused = None
        self.peak = self.config.peak_tflops or known_peak(pl_module.device, str(trainer.precision))
        if self.enabled and sys.stderr.isatty():
            self.bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, unit="step", dynamic_ncols=True)

    def on_validation_start(self, trainer, pl_module) -> None:
        self.paused = time.perf_counter()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.paused is not None:
            # Validation and sampling do not count for the speed of training.
            still = time.perf_counter() - self.paused
            self.started, self.ended, self.paused = self.started + still, self.ended + still, None
            self.recent = deque(((t + still, work) for t, work in self.recent), maxlen=self.recent.maxlen)
        self.work.wait += time.perf_counter() - self.ended
        if self.peak is not None:
            stage: Any = pl_module
            self.flops.begin(stage.batch_shape(batch))

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        self.flops.in_backward(True)

    def on_after_backward(self, trainer, pl_module) -> None:
        self.flops.in_backward(False)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self.peak is not None:
            self.work.flops += self.flops.end()
        self.ended = time.perf_counter()
        self.work.samples += len(batch["keys"])
        self.work.tokens += sum(counters.get("tokens", 0) for counters in batch["stats"].values())
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer, pl_module, batch_idx) -> None:
        self.recent.append((self.ended, self.work))
        self.work = Work()
        elapsed, work = self._recently()
        speed, waiting = work.samples * trainer.world_size / elapsed, work.wait / elapsed
        values = {"samples_per_s": speed, "data_wait": waiting, "memory_gib": most_memory(pl_module.device) / 2**30}
        if work.tokens:
            values["tokens_per_s"] = work.tokens * trainer.world_size / elapsed
        if self.peak is not None:
            values["mfu"] = work.flops / elapsed / (self.peak * 1e12)
        pl_module.log_dict({f"perf/{name}": value for name, value in values.items()}, batch_size=1)
        if self.enabled:
            self._show(trainer, pl_module, speed, waiting)

    def _recently(self) -> tuple[float, Work]:
        """(seconds, work) of the recent steps."""
        rows = list(self.recent)
        start = self.started if len(rows) == 1 else rows.pop(0)[0]
        return max(rows[-1][0] - start, 1e-9), sum((work for _, work in rows), Work())

    def _show(self, trainer, pl_module, speed: float, waiting: float) -> None:
        metrics = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
        values = {name: float(value) for name, value in metrics.items()}  # type: ignore[arg-type]
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "train/tokens")
        text += f", {speed:.0f} samples/s, data wait {waiting:.0%}"
        step, total = trainer.global_step, trainer.max_steps
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            self.bar.update(step - self.bar.n)
        elif step == total or step % max(1, total // self.config.lines) == 0:
            print(f"step {step}/{total}: {text}", file=sys.stderr, flush=True)

    def on_train_end(self, trainer, pl_module) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.flops.stop()
        self.on_train_end(trainer, pl_module)


def known_peak(device: torch.device, precision: str) -> float | None:
    """Peak rate of a device in bf16, TFLOP/s; None if it is not known, or another precision is trained in."""
    if device.type != "cuda" or "16" not in precision:
        return None
    gpu = gpu_named(torch.cuda.get_device_name(device))
    return gpu and gpu.tflops


def most_memory(device: torch.device) -> int:
    """Bytes of the most memory that torch had allocated on a GPU; elsewhere, that this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
