"""A run that was cut off and went on is, bit for bit, the run that never was."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from mmlab.config.errors import ConfigError, RunError
from mmlab.data.module import ShardDataModule
from mmlab.training import checkpoint_folder, checkpoint_io, preemption
from mmlab.training.config import BatchLogConfig, CheckpointsConfig
from mmlab.training.preemption import Preempted
from mmlab.training.resume_proof import BatchLog, difference, read_batches
from tests.tiny_shards import make_shards, settings, sources
from tests.tiny_trainer import Keys, Kill, KillAt, run

STEPS, VAL_EVERY = 12, 4


class Noisy(L.LightningModule):
    """Draws from every generator, in training and in validation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.losses: dict[int, float] = {}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        noise = torch.randn(len(batch["x"]), 1) + random.random() + np.random.rand()
        loss = (self.net(batch["x"] / 97) - noise).square().mean()
        self.losses[self.global_step + 1] = float(loss)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/noise", torch.rand(()) + random.random() + self.net(batch["x"] / 97).mean(), batch_size=1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def data_of(root: Path, **options: Any) -> ShardDataModule:
    train, val = sources(root / "a", root / "b"), sources(root / "b")
    return ShardDataModule(settings(**{"train": train, "val": val, **options}), Keys())


def train(root: Path, folder: Path, *callbacks: L.Callback, devices: int = 1, **options: Any) -> tuple[Noisy, dict]:
    """Resume the run in `folder`, or start it."""
    folder.mkdir(exist_ok=True)
    data, stage = data_of(root, **options), Noisy()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    logged = [*callbacks, BatchLog(BatchLogConfig(folder=str(folder)))]
    return stage, run(stage, data, folder, STEPS, logged, devices=devices, val_every=VAL_EVERY)


def last_state(folder: Path) -> dict[str, Any]:
    state = checkpoint_io.read(folder / "checkpoints" / f"step-{STEPS}")
    assert {"state_dict", "optimizer_states", "lr_schedulers", "rng", "ShardDataModule"} <= state.keys()
    return state


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    make_shards(root / "a", 21)
    make_shards(root / "b", 8)
    return root


@pytest.fixture(scope="module")
def straight(root):
    stage, metrics = train(root, root / "straight")
    return last_state(root / "straight"), read_batches(root / "straight")[0], metrics, stage.losses


CUTS = {
    "mid-accumulation": ("start", 11),
    "before a save": ("end", 11),
    "first step": ("start", 0),
    "after a save": ("start", 12),
    "end of the first pass": ("start", 7),
    "validation after a save": ("validation", 4),
    "last validation": ("validation", 12),
    "last step": ("end", 23),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", CUTS)
def test_a_run_that_was_killed_equals_the_straight_one(root, tmp_path, straight, cut, workers):
    state, batches, metrics, losses = straight
    with pytest.raises(Kill):
        train(root, tmp_path, KillAt(*CUTS[cut]), workers=workers)
    stage, again = train(root, tmp_path, workers=2 - workers)
    assert read_batches(tmp_path) == (batches, [])
    assert difference(last_state(tmp_path), state) is None
    assert again == metrics
    assert stage.losses.items() <= losses.items()


def test_two_cuts_and_other_micro_batches(root, tmp_path, straight):
    for micro in (5, 19):
        with pytest.raises(Kill):
            train(root, tmp_path, KillAt("start", micro))
    train(root, tmp_path)
    assert difference(last_state(tmp_path), straight[0]) is None


@pytest.mark.parametrize("what", ["rng", "cursor"])
def test_the_comparison_finds_what_a_resume_lost(root, tmp_path, straight, monkeypatch, what):
    """Negative controls: without random state, or one sample off, the run is another one."""
    with pytest.raises(Kill):
        train(root, tmp_path, KillAt("start", 11))
    if what == "rng":
        monkeypatch.setattr("mmlab.training.rng.set_state", lambda state: None)
    else:
        load = ShardDataModule.load_state_dict
        shifted = lambda self, state: load(self, {**state, "position": state["position"] + 8})  # noqa: E731
        monkeypatch.setattr(ShardDataModule, "load_state_dict", shifted)
        monkeypatch.setattr(ShardDataModule, "_begin", lambda self: self._base // 4)
    train(root, tmp_path)
    monkeypatch.undo()
    assert difference(last_state(tmp_path)["state_dict"], straight[0]["state_dict"]) is not None
    assert (read_batches(tmp_path)[0] == straight[1]) == (what == "rng")


def test_a_complete_run_that_is_started_again_trains_nothing(root, tmp_path, straight):
    train(root, tmp_path)
    before = (tmp_path / "batches-0.jsonl").read_text()
    _, metrics = train(root, tmp_path)
    assert (tmp_path / "batches-0.jsonl").read_text() == before
    assert metrics["train/loss"] == straight[2]["train/loss"]


def test_checkpoints_are_kept_and_cleared(root, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".draft-old").mkdir()
    train(root, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["step-12", "step-9"]
    with pytest.raises(ConfigError, match="'keep' must be at least 2, not 1"):
        CheckpointsConfig(folder=str(folder), keep=1)


def test_a_damaged_checkpoint_costs_one_interval(root, tmp_path, straight, capsys):
    with pytest.raises(Kill):
        train(root, tmp_path, KillAt("start", 15))
    newest = max(checkpoint_folder.steps(tmp_path / "checkpoints").items())[1]
    (newest / checkpoint_folder.STATE).write_bytes(b"")
    train(root, tmp_path)
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert difference(last_state(tmp_path), straight[0]) is None


class SignalAt(L.Callback):
    def __init__(self, micro: int, *numbers: int, validation: bool = False):
        self.micro, self.numbers, self.validation = micro, numbers, validation

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == self.micro and not self.validation:
            self._send()

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if self.validation and trainer.global_step == self.micro:
            self._send()

    def _send(self) -> None:
        for number in self.numbers:
            os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", preemption.LEAVE_ON)
def test_a_signal_lets_the_step_end_saves_and_leaves(root, tmp_path, straight, number, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    before = signal.getsignal(number)
    with pytest.raises(Preempted, match=rf"stopped by {signal.Signals(number).name}: step 5 of 12 is saved") as left:
        train(root, tmp_path, SignalAt(8, number), workers=2)
    assert left.value.exit_code == (130 if number == signal.SIGINT else 143)
    assert signal.getsignal(number) == before
    assert max(checkpoint_folder.steps(tmp_path / "checkpoints")) == 5
    assert len((tmp_path / "batches-0.jsonl").read_text().splitlines()) == 10
    train(root, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "batches-0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [step for step in range(1, 13) for _ in range(2)]
    assert difference(last_state(tmp_path), straight[0]) is None


def test_a_signal_during_validation_leaves_and_the_validation_is_made_up_for(root, tmp_path, straight, capsys):
    with pytest.raises(Preempted, match="step 4 of 12"):
        train(root, tmp_path, SignalAt(4, signal.SIGTERM, validation=True))

    class Count(L.Callback):
        steps: list[int] = []

        def on_validation_end(self, trainer, pl_module) -> None:
            self.steps.append(trainer.global_step)

    count = Count()
    train(root, tmp_path, count)
    assert count.steps == [4, 8, 12]
    assert difference(last_state(tmp_path), straight[0]) is None


def test_ctrl_c_twice_leaves_at_once(root, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(root, tmp_path, SignalAt(8, signal.SIGINT, signal.SIGINT))
    assert max(checkpoint_folder.steps(tmp_path / "checkpoints")) == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_after_sigusr_still_asks_for_a_new_start(root, tmp_path, fake_slurm):
    with pytest.raises(Preempted, match=r"stopped by SIGUSR2.*job 77 is requeued"):
        train(root, tmp_path, SignalAt(8, signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR2))
    assert fake_slurm.read_text() == "requeue 77\n"


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch) -> Path:
    """An `scontrol` that writes down what it is asked."""
    tool, said = tmp_path / "bin" / "scontrol", tmp_path / "said"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    return said


def test_requeue(fake_slurm, monkeypatch):
    assert preemption.requeue(signal.SIGTERM) == "the same command resumes it"
    assert not fake_slurm.exists()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    assert "job 70_5 is requeued" in preemption.requeue(signal.SIGUSR1)
    assert fake_slurm.read_text() == "requeue 70_5\n"
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    preemption.requeue(signal.SIGUSR1)
    monkeypatch.delenv("SLURM_JOB_NAME")
    monkeypatch.setenv("PATH", "")
    assert "could not be requeued" in preemption.requeue(signal.SIGUSR1)
    assert fake_slurm.read_text() == "requeue 70_5\n"


def test_a_job_without_a_step_is_not_queued_again(root, tmp_path, fake_slurm):
    folder = tmp_path / "run"
    with pytest.raises(Preempted):
        train(root, folder, SignalAt(7, signal.SIGUSR1))  # in the step before a validation, which a resume begins with
    fake_slurm.unlink()
    with pytest.raises(Preempted, match="no step was made"):
        train(root, folder, SignalAt(4, signal.SIGUSR1, validation=True))
    assert not fake_slurm.exists()


def test_a_launchers_own_handler_requeues(root, tmp_path, fake_slurm, capsys):
    """submitit's handler queues the job again and leaves: it is called once the state is saved."""
    seen = []

    def submitit(number, frame):
        seen.append((number, max(checkpoint_folder.steps(tmp_path / "checkpoints"))))
        raise SystemExit(-1)

    before = signal.signal(signal.SIGUSR2, submitit)
    try:
        with pytest.raises(SystemExit):
            train(root, tmp_path, SignalAt(8, signal.SIGUSR2))
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen == [(signal.SIGUSR2, 5)]
    assert "step 5 of 12 is saved" in capsys.readouterr().err
    assert not fake_slurm.exists()


def test_a_full_disk_does_not_end_training_but_leaving_says_what_is_lost(root, tmp_path, monkeypatch, capsys):
    def full(state, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_io, "write", full)
    with pytest.raises(RunError, match=r"step 5 of 12, which is not saved.*No space left"):
        train(root, tmp_path, SignalAt(8, signal.SIGTERM))
    assert "step-3 could not be written" in capsys.readouterr().err
    monkeypatch.undo()
    train(root, tmp_path)
    assert max(checkpoint_folder.steps(tmp_path / "checkpoints")) == 12


def test_ranks_may_change(root, tmp_path, straight):
    """2 gloo ranks → 1 → 2 train on the same global batches; all leave after the same step."""
    options = {"global_batch": 8, "micro_batch": 2}
    with pytest.raises(ProcessRaisedException, match="Preempted"):
        train(root, tmp_path, SignalOnOneRank(4), devices=2, **options)
    assert max(checkpoint_folder.steps(tmp_path / "checkpoints")) == 4
    assert {len((tmp_path / f"batches-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)} == {8}
    with pytest.raises(Preempted):
        train(root, tmp_path, SignalAt(31, signal.SIGTERM), **options)
    train(root, tmp_path, devices=2, **options)
    batches, differing = read_batches(tmp_path)
    assert batches == straight[1] and not differing


class SignalOnOneRank(L.Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_rank == 1 and trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
