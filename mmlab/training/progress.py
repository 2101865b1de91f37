"""A run's progress: a bar on a terminal, plain lines elsewhere; speed and data wait go to the logger."""

import sys
import time
from collections import deque

from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from mmlab.training.config import ProgressConfig
from mmlab.training.step_callback import StepCallback


class Progress(StepCallback, ProgressBar):
    """Shows loss, samples/s and the share of time spent waiting for data, per optimizer step.

    Args:
        config: settings.
    """

    def __init__(self, config: ProgressConfig):
        super().__init__()
        self.config = config
        self.enabled = True
        self.bar: tqdm | None = None
        self.paused: float | None = None
        # Start of recent steps, time lost waiting for data, and samples, for a speed over the last steps.
        self.recent: deque[tuple[float, float, int]] = deque(maxlen=50)

    def enable(self) -> None:
        self.enabled = True

    def disable(self) -> None:
        """Lightning calls this on every rank but the first."""
        self.enabled = False

    def on_train_start(self, trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        self.ended = time.perf_counter()
        self.started = self.ended
        self.wait, self.samples = 0.0, 0
        self.paused = None
        if self.enabled and sys.stderr.isatty():
            self.bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, unit="step", dynamic_ncols=True)

    def on_validation_start(self, trainer, pl_module) -> None:
        self.paused = time.perf_counter()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.paused is not None:
            # Validation and sampling do not count for the speed of training.
            still = time.perf_counter() - self.paused
            self.started, self.ended, self.paused = self.started + still, self.ended + still, None
            self.recent = deque(((t + still, wait, n) for t, wait, n in self.recent), maxlen=self.recent.maxlen)
        self.wait += time.perf_counter() - self.ended

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.ended = time.perf_counter()
        self.samples += len(batch["keys"]) * trainer.world_size
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer, pl_module, batch_idx) -> None:
        self.recent.append((self.ended, self.wait, self.samples))
        self.wait, self.samples = 0.0, 0
        speed, waiting = self._speed()
        pl_module.log_dict({"perf/samples_per_s": speed, "perf/data_wait": waiting}, batch_size=1)
        if self.enabled:
            self._show(trainer, pl_module, speed, waiting)

    def _speed(self) -> tuple[float, float]:
        """(samples per second, share of time spent waiting for data) over the recent steps."""
        if len(self.recent) < 2:
            elapsed = max(self.recent[-1][0] - self.started, 1e-9)
            return self.recent[-1][2] / elapsed, self.recent[-1][1] / elapsed
        rows = list(self.recent)
        elapsed = max(rows[-1][0] - rows[0][0], 1e-9)
        return sum(r[2] for r in rows[1:]) / elapsed, sum(r[1] for r in rows[1:]) / elapsed

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
        self.on_train_end(trainer, pl_module)
