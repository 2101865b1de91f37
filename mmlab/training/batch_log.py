"""Which samples each step trained on, for proofs that none is lost or repeated."""

import json
import os
import signal
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class BatchLog(Callback):
    """Appends a line of JSON per micro batch to `<folder>/batches-<rank>.jsonl`: its step and its samples' keys.

    A run that was killed and went on writes the steps since its last checkpoint twice; they must be equal.

    Args:
        folder: usually the run's.
        kill_at: SIGKILL to the whole process group (ranks and data workers too) as this step begins, as a node that
            fails ends a run; None never. Only for runs in a session of their own.
    """

    def __init__(self, folder: str, kill_at: int | None = None):
        self.folder = Path(folder)
        self.kill_at = kill_at

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        line = json.dumps({"step": trainer.global_step + 1, "micro": batch_idx, "keys": batch["keys"]})
        # Unbuffered: a kill leaves whole lines.
        with (self.folder / f"batches-{trainer.global_rank}.jsonl").open("ab", buffering=0) as file:
            file.write(line.encode() + b"\n")
        if trainer.global_step + 1 == self.kill_at:
            os.killpg(os.getpgrp(), signal.SIGKILL)


def read_batches(folder: Path) -> tuple[dict[int, list[str]], list[str]]:
    """Read what the ranks of a run have logged.

    Returns:
        Step → keys of its global batch, sorted: ranks and micro batches may cut it otherwise. And sentences
        about micro batches that were trained twice with different samples.
    """
    steps: dict[int, list[str]] = {}
    differing: list[str] = []
    for file in sorted(folder.glob("batches-*.jsonl")):
        seen: dict[tuple[int, int], list[str]] = {}
        for text in file.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            at = line["step"], line["micro"]
            if seen.setdefault(at, line["keys"]) != line["keys"]:
                differing.append(f"step {at[0]} was trained on {seen[at]}, and after going on on {line['keys']}")
        for (step, _), keys in seen.items():
            steps.setdefault(step, []).extend(keys)
    return {step: sorted(keys) for step, keys in sorted(steps.items())}, differing
