"""Proof that a resumed run equals an uninterrupted one: the samples of each step, and a comparison of two states."""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mmlab.runs.disk import to_json
from mmlab.runs.metrics_table import FILE_NAME, read_table
from mmlab.training.config import BatchLogConfig

# What a run depends on is recorded, not a result: two runs have their own ids, and a commit may come in between …
NOT_COMPARED = (".identity",)
FETCHING = ("data/wait", "data/fetch_mb_s", "data/cache_hit")
SPEED = ("perf/", *FETCHING)  # … and their speed is never the same, nor that of the data.


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """The first place where two nested states (dicts, lists, tensors, plain data) are not the same, or None.

    Tensors must have the same dtype, shape and bits; NaN equals NaN.
    """
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return _tensors(a, b, where)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = [key for key in {**a, **b} if f"{where}.{key}" not in NOT_COMPARED and not str(key).startswith(SPEED)]
        missing = [key for key in keys if key not in a or key not in b]
        if missing:
            return f"{where.lstrip('.')}: only one of them has {missing[0]!r}"
        pairs = [(key, a[key], b[key]) for key in keys]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{where.lstrip('.')}: {len(a)} items and {len(b)}"
        pairs = [(str(i), x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        same = type(a) is type(b) and (a == b or (a != a and b != b))
        return None if same else f"{where.lstrip('.')}: {a!r} and {b!r}"
    differences = (difference(x, y, f"{where}.{key}") for key, x, y in pairs)
    return next((one for one in differences if one is not None), None)


def _tensors(a: torch.Tensor, b: torch.Tensor, where: str) -> str | None:
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{where.lstrip('.')}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
    unequal = a != b
    if a.is_floating_point():
        unequal &= ~(a.isnan() & b.isnan())
    count = int(unequal.sum())
    if not count:
        return None
    most = float((a.double() - b.double()).abs().max())
    return f"{where.lstrip('.')}: {count} of {a.numel()} numbers differ, by up to {most:.3g}"


class BatchLog(Callback):
    """Appends a line of JSON per micro-batch to `<folder>/batches-<rank>.jsonl`: its step and its samples' keys.

    A run that was killed and resumed writes the steps since its last checkpoint twice; they must be equal. With
    `kill_at` or `kill_in_validation`, a step or its validation begins with SIGKILL to the whole process group (ranks
    and data workers too), as when a node fails: only for runs in a session of their own.

    Args:
        config: settings.
    """

    def __init__(self, config: BatchLogConfig):
        self.config = config

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        line = to_json({"step": trainer.global_step + 1, "micro": batch_idx, "keys": batch["keys"]})
        # Unbuffered: a kill leaves whole lines.
        with Path(self.config.folder, f"batches-{trainer.global_rank}.jsonl").open("ab", buffering=0) as file:
            file.write(line.encode() + b"\n")
        if trainer.global_step + 1 == self.config.kill_at:
            os.killpg(os.getpgrp(), signal.SIGKILL)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.global_step == self.config.kill_in_validation:
            os.killpg(os.getpgrp(), signal.SIGKILL)


def results(run: Path) -> dict[str, Any]:
    """What the files in a run's folder say about it: table of metrics, data report and last metrics, by file."""
    files: dict[str, Any] = {FILE_NAME: read_table(run / FILE_NAME)}
    for name in ("data_report.json", "done.json"):
        files[name] = json.loads((run / name).read_text()) if (run / name).is_file() else None
    return files


def read_batches(folder: Path) -> tuple[dict[int, list[str]], list[str]]:
    """Read what the ranks of a run have logged.

    Returns:
        Step → keys of its global batch, sorted because ranks and micro-batches may split it differently; and a
        sentence about each micro-batch that was trained twice, with different samples.
    """
    steps: dict[int, list[str]] = {}
    differing: list[str] = []
    for file in sorted(folder.glob("batches-*.jsonl")):
        seen: dict[tuple[int, int], list[str]] = {}
        for text in file.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            at = line["step"], line["micro"]
            if seen.setdefault(at, line["keys"]) != line["keys"]:
                differing.append(f"step {at[0]} was trained on {seen[at]}, and after a resume on {line['keys']}")
        for (step, _), keys in seen.items():
            steps.setdefault(step, []).extend(keys)
    return {step: sorted(keys) for step, keys in sorted(steps.items())}, differing
