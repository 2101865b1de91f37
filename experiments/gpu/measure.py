"""Measure a run, or what `mmlab plan` expects of it: measure.py train|plan FILE OVERRIDES writes FILE.

The run saves nothing: neither checkpoints nor artifacts, which would be larger than many disks.
"""

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig

from mmlab.config.build import build
from mmlab.config.compose import compose
from mmlab.stage.assembly import build_data, build_stage
from mmlab.stage.estimate import estimate
from mmlab.training.progress import most_memory
from mmlab.training.trainer import build_trainer, fit

WARM = 10  # steps that are not measured


def train(cfg: DictConfig) -> dict[str, Any]:
    """Speeds of the steps after the first ones, and the peak of the memory."""
    L.seed_everything(cfg.seed, verbose=False)
    stage = build_stage(cfg)
    data = build_data(cfg, stage)
    progress = build(cfg.callbacks.progress)
    trainer = build_trainer(cfg.trainer, Path(), None, [progress], data, data.plan(cfg.trainer.max_steps))
    losses = fit(trainer, stage, data, fresh=True)
    rows = list(progress.recent)[WARM:]
    seconds, works = rows[-1][0] - rows[0][0], [work for _, work in rows[1:]]
    device = stage.device
    gpu = device.type == "cuda"
    flops = sum(work.flops for work in works)
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "CPU",
        "memory_gib": most_memory(device) / 2**30,
        "samples_per_s": sum(work.samples for work in works) / seconds,
        "tokens_per_s": sum(work.tokens for work in works) / seconds,
        "tokens_per_sample": sum(work.tokens for work in works) / sum(work.samples for work in works),
        "tflop_per_step": flops / len(works) / 1e12,
        "tflop_per_s": flops / seconds / 1e12,
        "mfu": flops / seconds / (progress.peak * 1e12) if gpu else None,
        "data_wait": sum(work.wait for work in works) / seconds,
        "loss": losses["train/loss"],
    }


def plan(cfg: DictConfig) -> dict[str, Any]:
    expected = estimate(cfg)
    return {"plan_gib": expected.peak / 2**30, "plan_tflop_per_step": expected.flops / 1e12}


if __name__ == "__main__":
    figures = {"train": train, "plan": plan}[sys.argv[1]](compose("train", sys.argv[3:]))
    Path(sys.argv[2]).write_text(json.dumps(figures))
