"""Speedup of training a prior from cached codes instead of images: speed.py PICTURES CODES, next to runs/emoji-vqgan.

Both train the recipe emoji/prior for 60 steps, one after the other; the last 40 steps are compared.
"""

import json
import sys
import time
from typing import Any

import lightning as L

from mmlab.config.compose import compose
from mmlab.stage.assembly import build_data, build_stage

STEPS, WARM = 60, 20


class Clock(L.Callback):
    """Record the end time and the loss of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.ends.append(time.perf_counter())
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def train(source: str, latents: bool) -> Clock:
    path = f"data.train=[{{path: {source}, name: train}}]"
    cfg = compose("train", ["experiment=emoji/prior", "data.root=.", path, "data.val=[]", f"data.latents={latents}"])
    L.seed_everything(0, verbose=False)
    stage = build_stage(cfg)
    data, clock = build_data(cfg, stage), Clock()
    quiet: Any = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=-1, max_steps=data.plan(STEPS), callbacks=[clock], limit_val_batches=0,
        use_distributed_sampler=False, **quiet,
    )  # fmt: skip
    trainer.fit(stage, data)
    return clock


pictures, codes = train(sys.argv[1], False), train(sys.argv[2], True)
seconds = [(clock.ends[-1] - clock.ends[WARM - 1]) / (STEPS - WARM) for clock in (pictures, codes)]
apart = max(abs(a - b) for a, b in zip(pictures.losses, codes.losses, strict=True))
print(json.dumps({"step_ratio": seconds[0] / seconds[1], "losses_apart": apart}))
