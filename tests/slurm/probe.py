"""A callback that records the samples of each step; jobs of the tests import it as a user's own package."""

import json
import os
import time
from pathlib import Path

from lightning import Callback


class Probe(Callback):
    """Appends a line per micro batch; in the first start of a job it sleeps PROBE_PAUSE seconds before each."""

    def __init__(self):
        self.start = os.environ.get("SLURM_RESTART_COUNT", "0")
        self.pause = float(os.environ.get("PROBE_PAUSE", "0")) if self.start == "0" else 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.step = trainer.global_step
        time.sleep(self.pause)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        line = {"step": self.step, "keys": batch["keys"], "start": self.start}
        with Path(trainer.default_root_dir, f"keys-{trainer.global_rank}.jsonl").open("a") as out:
            out.write(json.dumps(line) + "\n")
