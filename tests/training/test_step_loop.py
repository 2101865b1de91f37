"""Validations are a function of the optimizer step, whatever happened to the run before."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from mmlab.data.module import ShardDataModule
from mmlab.runs.metrics_table import read_table
from mmlab.training import checkpoint_folder, checkpoint_io
from mmlab.training.config import AdamWConfig, CSVLogConfig
from mmlab.training.csv_log import CSVLog
from mmlab.training.optim import AdamW
from mmlab.training.resume_proof import difference
from tests.tiny_shards import make_shards, settings, sources
from tests.tiny_trainer import Keys, Kill, KillAt, run


class Line(L.LightningModule):
    """Its validation depends on every sample of every batch."""

    def __init__(self, schedule: str):
        super().__init__()
        torch.manual_seed(0)
        self.line = torch.nn.Linear(1, 1)
        self.schedule = schedule
        self.rates: dict[int, float] = {}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.rates[self.global_step + 1] = self.trainer.optimizers[0].param_groups[0]["lr"]
        loss = (self.line(batch["x"] / 97) - 1).square().mean()
        self.log("train/loss", loss, batch_size=len(batch["x"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        x = batch["x"] / 97
        self.log("val/loss", (self.line(x) - x).square().mean(), batch_size=len(x))

    def configure_optimizers(self) -> Any:
        warmup = 0.0 if self.schedule == "constant" else 0.25
        config = AdamWConfig(lr=0.1, schedule=self.schedule, warmup_ratio=warmup, min_lr=0.01)
        return AdamW(config).build(self, self.trainer.max_steps)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    make_shards(root / "a", 21)
    make_shards(root / "b", 10)
    return root


def train(
    root: Path,
    folder: Path,
    steps: int,
    *callbacks: L.Callback,
    val_every: int | None = 2,
    micro_batch: int = 4,
    schedule: str = "constant",
    **options: Any,
) -> tuple[Line, dict[str, float]]:
    """Start the run in `folder`, or resume it."""
    config = settings(train=sources(root / "a"), val=sources(root / "b"), micro_batch=micro_batch)
    data, stage = ShardDataModule(config, Keys()), Line(schedule)
    options = {"logger": CSVLog(CSVLogConfig(save_dir=str(folder))), "log_every_n_steps": 1, **options}
    return stage, run(stage, data, folder, steps, callbacks, val_every=val_every, **options)


def table(folder: Path) -> dict[int, dict[str, str]]:
    return read_table(folder / "metrics.csv")


def validated(folder: Path) -> list[int]:
    return [step for step, row in table(folder).items() if "val/loss" in row]


@pytest.mark.parametrize("step", [2, 4, 6, 8, 9])
def test_a_validation_that_was_killed_is_repeated_over_all_samples(root, tmp_path, step):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    _, metrics = train(root, straight, 9)
    with pytest.raises(Kill):
        train(root, killed, 9, KillAt("validation", step))
    assert train(root, killed, 9)[1] == metrics
    assert table(killed) == table(straight) and validated(killed) == [2, 4, 6, 8, 9]
    last, other = (checkpoint_io.read(folder / "checkpoints" / "step-9") for folder in (straight, killed))
    assert difference(last, other) is None


@pytest.mark.parametrize("kill", [("train end", 0), ("validation", 6)])
def test_a_run_that_was_killed_at_its_end_ends_once_more(root, tmp_path, kill):
    class Ends(L.Callback):
        ended = 0

        def on_train_end(self, trainer, pl_module) -> None:
            self.ended += 1

    with pytest.raises(Kill):
        train(root, tmp_path, 6, KillAt(*kill))
    ends = Ends()
    stage, metrics = train(root, tmp_path, 6, ends)
    assert ends.ended == 1 and not stage.rates and metrics.keys() == {"train/loss", "val/loss"}


@pytest.mark.parametrize(
    ("ends", "val_every", "steps"),
    [
        ([4, 8], 2, [2, 4, 6, 8]),
        ([4, 7], 2, [2, 4, 6, 7]),
        ([5, 8], 2, [2, 4, 5, 6, 8]),  # 5 was the end, and its row stays
        ([2, 3, 6], 4, [2, 3, 4, 6]),
        ([4, 8], None, [4, 8]),
        ([4], 100, [4]),
    ],
)
@pytest.mark.parametrize("micro_batches", [(4, 4, 4), (8, 2, 4)])
def test_an_extended_run_validates_as_if_its_end_had_not_changed(root, tmp_path, ends, val_every, steps, micro_batches):
    before: dict[int, dict[str, str]] = {}
    for end, micro_batch in zip(ends, micro_batches, strict=False):
        _, metrics = train(root, tmp_path, end, val_every=val_every, micro_batch=micro_batch)
        rows = table(tmp_path)
        assert metrics["val/loss"] == float(rows[end]["val/loss"])
        assert before.items() <= rows.items(), "a row stays"
        before = rows
    assert validated(tmp_path) == steps


@pytest.mark.parametrize("ends", [[4, 8], [5, 8], [3, 4, 8]])
def test_an_extended_run_is_the_run_that_had_this_end_from_the_beginning(root, tmp_path, ends):
    for end in ends:
        train(root, tmp_path / "extended", end)
    train(root, tmp_path / "straight", 8)
    extended, straight = (
        checkpoint_io.read(tmp_path / name / "checkpoints" / "step-8") for name in ("extended", "straight")
    )
    assert difference(extended, straight) is None


def test_the_row_of_an_earlier_end_stays_when_validation_changes(root, tmp_path):
    train(root, tmp_path, 4)
    before = table(tmp_path)
    _, metrics = train(root, tmp_path, 6, limit_val_batches=1)
    assert before.items() <= table(tmp_path).items()
    assert metrics["val/loss"] == float(table(tmp_path)[6]["val/loss"])
    assert "val/loss" not in train(root, tmp_path, 8, limit_val_batches=0)[1], "none of another step"


def test_the_schedule_survives_a_sanity_check_and_other_ranks(root, tmp_path):
    train(root, tmp_path, 4, devices=2, num_sanity_val_steps=1)
    assert validated(tmp_path) == [2, 4]
    train(root, tmp_path, 7, num_sanity_val_steps=1)
    assert validated(tmp_path) == [2, 4, 6, 7]


def test_overfitting_has_the_same_schedule(root, tmp_path):
    overfit: Any = {"overfit_batches": 2, "limit_val_batches": 3}
    train(root, tmp_path / "straight", 7, **overfit)
    with pytest.raises(Kill):
        train(root, tmp_path / "killed", 7, KillAt("validation", 4), **overfit)
    train(root, tmp_path / "killed", 5, **overfit)
    train(root, tmp_path / "killed", 7, **overfit)
    assert validated(tmp_path / "straight") == [2, 4, 6, 7] and validated(tmp_path / "killed") == [2, 4, 5, 6, 7]
    assert table(tmp_path / "straight")[7] == table(tmp_path / "killed")[7]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("end", "killed_in", "later"), [(4, None, 8), (7, None, 8), (6, 5, 20), (20, 5, 6)])
def test_the_rates_after_a_resume_are_those_of_the_new_end(root, tmp_path, schedule, end, killed_in, later):
    straight = train(root, tmp_path / "straight", later, schedule=schedule)[0].rates
    if killed_in is None:
        train(root, tmp_path, end, schedule=schedule)
    else:
        with pytest.raises(Kill):
            train(root, tmp_path, end, KillAt("start", 2 * killed_in - 1), schedule=schedule)
    begins = max(checkpoint_folder.steps(tmp_path / "checkpoints")) + 1
    resumed = train(root, tmp_path, later, schedule=schedule)[0].rates
    assert resumed == {step: straight[step] for step in range(begins, later + 1)}
