"""From the `trainer` section to Lightning."""

import signal
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from torch import nn

from mmlab.config.compose import compose
from mmlab.config.errors import ConfigError, RunError
from mmlab.data.module import ShardDataModule
from mmlab.training import trainer as ours
from mmlab.training.checkpoint import Checkpoints
from mmlab.training.config import CheckpointsConfig, ProgressConfig
from mmlab.training.progress import Progress
from mmlab.training.trainer import environment
from tests.tiny_shards import KeyCollate, make_shards, settings, sources

PARTS = ["model=llava", "data=shapes", "stage=align", "trainer=cpu"]


def section(*overrides: str):
    return compose("train", [*PARTS, *(f"trainer.{override}" for override in overrides)]).trainer


class Data:
    def accumulation(self, world: int) -> int:
        return 8 // world


def build(tmp_path, *overrides: str, steps: int = 20, callbacks=()) -> Any:
    return ours.build_trainer(section(*overrides), tmp_path, None, list(callbacks), Data(), steps)


def test_steps_and_accumulation_come_from_the_data(tmp_path):
    trainer = build(tmp_path)
    assert (trainer.max_steps, trainer.accumulate_grad_batches) == (20, 8)
    assert trainer.num_sanity_val_steps == 0
    assert str(trainer.default_root_dir) == str(tmp_path)
    assert trainer.checkpoint_callback is None and trainer.logger is None


def test_options_are_passed_on_only_where_they_are_given(tmp_path):
    plain = build(tmp_path)
    assert (plain.gradient_clip_val, plain.limit_val_batches, plain.overfit_batches) == (None, 1.0, 0.0)
    trainer = build(tmp_path, "gradient_clip_val=0.5", "limit_val_batches=3", "precision=bf16-mixed")
    assert (trainer.gradient_clip_val, trainer.limit_val_batches) == (0.5, 3)
    assert trainer.precision == "bf16-mixed"


@pytest.mark.parametrize("profile", ["simple", "advanced", "pytorch"])
def test_a_profile_is_written_to_the_folder(tmp_path, profile):
    profiler = build(tmp_path, f"profile={profile}").profiler
    profiler.setup("fit")
    profiler.describe()
    assert (tmp_path / "fit-profile.txt").is_file()


@pytest.mark.parametrize("batches", [0, 3])
def test_overfitting_repeats_one_global_batch_and_leaves_validation_alone(tmp_path, batches):
    trainer = build(tmp_path, "overfit=true", f"limit_val_batches={batches}")
    assert (trainer.overfit_batches, trainer.limit_train_batches) == (8, 8)
    assert trainer.limit_val_batches == batches


def test_validation_is_counted_in_optimizer_steps(tmp_path):
    loop = build(tmp_path, "val_every=5").fit_loop.epoch_loop
    assert (loop.val_every, loop.max_steps) == (5, 20)


@pytest.mark.parametrize("devices", [1, 2, "auto", -1])
def test_micro_batches_are_counted_for_the_processes_that_lightning_starts(tmp_path, devices):
    trainer = build(tmp_path, f"devices={devices}")
    assert trainer.accumulate_grad_batches == 8 // trainer.world_size
    assert trainer.world_size == (2 if devices == 2 else 1)


@pytest.mark.parametrize("kind", ["onednn", "torch"])
def test_matrix_products_are_computed_as_the_settings_say(tmp_path, monkeypatch, kind):
    used: list[str] = []
    monkeypatch.setattr(ours, "use_products", used.append)
    build(tmp_path, f"products={kind}")
    assert used == [kind]


def test_precision(monkeypatch):
    assert ours.precision("16-mixed", "cpu") == "16-mixed"
    for amx, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert ours.precision("auto", "cpu") == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capable, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda capable=capable: capable)
        assert ours.precision("auto", "auto") == expected


def test_place():
    model = ours.place(nn.Linear(1, 1).train(), section("precision=bf16-mixed"))
    assert not model.training and next(model.parameters()).dtype == torch.float32


class Line(L.LightningModule):
    """Learns one number; `interrupt` stops it at a step as Ctrl-C would."""

    def __init__(self, interrupt: int | None = None):
        super().__init__()
        self.model = nn.ModuleDict({"weight": nn.Linear(1, 1)})
        self.interrupt = interrupt
        self.steps: list[int] = []

    def validation_step(self, batch, batch_idx):
        pass

    def training_step(self, batch, batch_idx):
        if self.global_step == self.interrupt:
            raise KeyboardInterrupt
        self.steps.append(self.global_step)
        loss = ((self.model["weight"](batch["x"] / 97) - 1) ** 2).mean()
        self.log_dict({"train/loss": loss, "train/other": loss}, prog_bar=True, batch_size=4)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def data(tmp_path):
    make_shards(tmp_path / "shards", 12)
    config = settings(train=sources(tmp_path / "shards"), global_batch=4, micro_batch=2)
    made = ShardDataModule(config, KeyCollate())
    made.plan(6)
    return made


def trainer_for(data, folder):
    keep = Checkpoints(CheckpointsConfig(folder=str(folder / "checkpoints"), every_n_steps=2))
    callbacks: list[L.Callback] = [Progress(ProgressConfig()), keep]
    return ours.build_trainer(section(), folder, None, callbacks, data, data.total_steps)


@pytest.fixture
def sigint():
    """Lightning ignores the signal from the first interrupt on."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_fit_resumes_from_the_last_checkpoint_after_an_interrupt(tmp_path, data, capsys, sigint):
    stopped = Line(interrupt=5)
    with pytest.raises(KeyboardInterrupt):
        ours.fit(trainer_for(data, tmp_path), stopped, data)
    assert "resuming" not in capsys.readouterr().out
    rest = Line()
    metrics = ours.fit(trainer_for(data, tmp_path), rest, data)
    assert "resuming from" in capsys.readouterr().out
    assert set(metrics) == {"train/loss"}
    assert sorted({*stopped.steps}) == [0, 1, 2, 3, 4] and sorted({*rest.steps}) == [4, 5]
    # A later rank may look before the first one has renamed the folder of the earlier run.
    fresh = Line()
    ours.fit(trainer_for(data, tmp_path), fresh, data, fresh=True)
    assert "resuming" not in capsys.readouterr().out and sorted({*fresh.steps}) == [0, 1, 2, 3, 4, 5]


def test_an_error_is_not_an_interrupt(tmp_path, data):
    class Exits(Line):
        def training_step(self, batch, batch_idx):
            raise SystemExit(3)

    with pytest.raises(SystemExit) as stop:
        ours.fit(trainer_for(data, tmp_path), Exits(), data)
    assert stop.value.code == 3


@pytest.mark.parametrize(("saved", "done"), [([20, 30], None), ([20], 30)])
def test_an_end_that_has_passed_is_refused(tmp_path, saved, done):
    callbacks = [Checkpoints(CheckpointsConfig(folder=str(tmp_path / "checkpoints")))]
    ours.check_end(tmp_path / "new", callbacks, 1)
    for step in saved:
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    if done:
        (tmp_path / "done.json").write_text(f'{{"steps": {done}, "train/loss": NaN}}')
    ours.check_end(tmp_path, callbacks, 30)
    with pytest.raises(ConfigError, match="was trained for 30 steps and cannot end after 29; raise"):
        ours.check_end(tmp_path, callbacks, 29)
    (tmp_path / "done.json").write_text('{"steps"')
    with pytest.raises(RunError, match=r"done.json is damaged"):
        ours.check_end(tmp_path, callbacks, 30)


def test_a_complete_run_without_checkpoints_is_not_trained_over(tmp_path):
    (tmp_path / "done.json").write_text('{"steps": 30}')
    with pytest.raises(RunError, match="was trained for 30 steps and has no checkpoint to go on from; restore"):
        ours.check_end(tmp_path, [Checkpoints(CheckpointsConfig(folder=str(tmp_path / "checkpoints")))], 40)


TASK = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
STEP = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}


@pytest.fixture
def become(monkeypatch):
    for key in (*TASK, *STEP, "TORCHELASTIC_RUN_ID", "GROUP_RANK"):
        monkeypatch.delenv(key, raising=False)
    return lambda variables: [monkeypatch.setenv(key, value) for key, value in variables.items()]


def test_a_task_of_srun_is_a_rank_and_is_not_requeued_by_lightning(become):
    become(TASK | STEP)
    found = environment()
    assert isinstance(found, SLURMEnvironment)
    assert (found.world_size(), found.global_rank(), found.auto_requeue) == (2, 1, False)


@pytest.mark.parametrize("variables", [TASK, TASK | STEP | {"SLURM_JOB_NAME": "bash"}], ids=["batch", "shell"])
def test_within_an_allocation_but_without_srun_the_ranks_are_started_here(become, variables):
    become(variables)
    assert isinstance(environment(), LightningEnvironment)


def test_elsewhere_lightning_decides(become):
    assert environment() is None
    become(TASK | STEP | {"TORCHELASTIC_RUN_ID": "1", "GROUP_RANK": "0"})
    assert environment() is None
