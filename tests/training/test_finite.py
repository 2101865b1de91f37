"""NaN and infinity end a run at the step where they arise, before anything is saved, validated or sampled."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from mmlab.config.errors import RunError
from mmlab.data.module import ShardDataModule
from mmlab.stage.config import StageConfig
from mmlab.stage.stage import Stage
from mmlab.training import checkpoint_io, finite
from mmlab.training.config import AdamWConfig
from mmlab.training.finite import FiniteGuard
from mmlab.training.optim import AdamW
from tests.tiny_shards import make_shards, settings, sources
from tests.tiny_trainer import Keys, run

BAD_STEP, STEPS = 5, 9


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.eye, self.ear = nn.Linear(1, 4), nn.Linear(4, 1)
        self.ear.register_buffer("codebook", torch.zeros(3))
        self.ear.register_buffer("mask", torch.full((3,), -torch.inf))


class Poisoned(Stage):
    """Something is not finite from step `BAD_STEP` on."""

    def __init__(self, what: str):
        super().__init__(StageConfig(trainable=["eye", "ear"]), Parts(), AdamW(AdamWConfig(lr=0.01)))
        self.what, self.validated = what, []
        self.model.eye.weight.register_hook(lambda g: g / 0 if self.bad("gradient") else g)

    def bad(self, what: str) -> bool:
        return what == self.what and self.global_step + 1 >= BAD_STEP

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss = (self.model.ear(torch.relu(self.model.eye(batch["x"] / 97))) - 1).square().mean()
        return loss * torch.inf if self.bad("loss") and batch_idx % 2 == 0 else loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        bad = [name for name in ("weights", "codebook") if self.bad(name)]
        super().optimizer_step(*args, **kwargs)
        for name in bad:
            (self.model.ear.bias if name == "weights" else self.model.ear.codebook).data[0] = torch.nan

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated.append(self.global_step)
        self.log("val/loss", torch.tensor(torch.nan if self.what == "val/loss" else 1.0), batch_size=1)
        self.log("val/accuracy/absent", torch.tensor(torch.nan), batch_size=1)


def train(folder: Path, stage: Poisoned, *callbacks: L.Callback, **options: Any) -> dict[str, float]:
    for name, count in (("train", 16), ("val", 4)):
        if not (folder / name).exists():
            make_shards(folder / name, count)
    shards = settings(train=sources(folder / "train"), val=sources(folder / "val"))
    options = {"val_every": 4, **options}
    return run(stage, ShardDataModule(shards, Keys()), folder, STEPS, [FiniteGuard(), *callbacks], **options)


@pytest.mark.parametrize("log_every", [1, 50], ids=["read at once", "read late"])
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("loss", r"The loss has NaN or infinity at step 5: lower optim.lr \(the peak rate is 0.0\d+\)"),
        ("gradient", "The gradient of eye has NaN or infinity at step 5"),
        ("weights", "The weights of ear have NaN or infinity at step 5"),
        ("codebook", "The weights of ear have NaN or infinity at step 5"),
    ],
)
def test_the_step_and_what_was_not_finite_are_named(tmp_path, what, says, log_every):
    stage = Poisoned(what)
    with pytest.raises(RunError, match=says):
        train(tmp_path, stage, log_every_n_steps=log_every)
    assert stage.validated == [4]
    steps = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert steps == ["step-3", "step-4"], "finite ones stay, and no other is saved"


def test_a_finite_run_ends_and_a_share_of_nothing_is_no_fault(tmp_path):
    metrics = train(tmp_path, Poisoned(""), log_every_n_steps=1)
    assert metrics["val/loss"] == 1 and metrics["val/accuracy/absent"] != metrics["val/accuracy/absent"]


def test_a_validation_loss_ends_the_run_too(tmp_path):
    with pytest.raises(RunError, match="val/loss is nan at step 4, though the training loss is finite"):
        train(tmp_path, Poisoned("val/loss"))


def test_a_step_that_the_loss_scale_skips_is_no_fault(tmp_path):
    class Scaled(L.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.precision_plugin.scaler = object()
            pl_module.optimizer_step = lambda epoch, batch, optimizer, closure: closure()  # as a scaler skips it

    metrics = train(tmp_path, Poisoned("gradient"), Scaled())
    assert metrics["val/loss"] == 1


def test_float16_advises_eps(tmp_path):
    class Half(L.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.precision_plugin.precision = "16-true"

    with pytest.raises(RunError, match=r"weights of ear .* in float16 optim.eps=1e-08 is 0, so set optim.eps=1e-4"):
        train(tmp_path, Poisoned("weights"), Half())


def test_a_checkpoint_with_nan_is_named(tmp_path):
    with pytest.raises(RunError):
        train(tmp_path, Poisoned("loss"))
    newest = tmp_path / "checkpoints" / "step-4"
    state = checkpoint_io.read(newest)
    state["state_dict"]["model.eye.weight"][0] = torch.nan
    checkpoint_io.write(state, newest)
    with pytest.raises(RunError, match=r"Checkpoint .*step-4 has NaN or infinity in the weights of eye; remove it"):
        train(tmp_path, Poisoned(""))


def test_a_start_with_nan_is_refused(tmp_path):
    stage = Poisoned("")
    stage.model.get_parameter("eye.weight").data[0] = torch.nan
    with pytest.raises(RunError, match=r"The run would start with NaN or infinity in the weights of eye\."):
        train(tmp_path, stage)


def test_the_advice_names_the_peak_rate():
    groups = [{"lr": 0.0, "initial_lr": 1e30}]  # after the last step of a schedule
    trainer: Any = SimpleNamespace(
        optimizers=[SimpleNamespace(param_groups=groups)], precision="32-true", gradient_clip_val=1.0
    )
    assert "lower optim.lr (the peak rate is 1e+30)" in finite._advice(trainer)
