"""The average is the formula's, survives kills bit by bit, and is what validation sees and the run leaves behind."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from mmlab.config.errors import ConfigError, RunError
from mmlab.data.module import ShardDataModule
from mmlab.stage.config import StageConfig
from mmlab.stage.stage import Stage
from mmlab.training import checkpoint_io
from mmlab.training.config import AdamWConfig, EMAConfig
from mmlab.training.ema import EMA, averaged
from mmlab.training.optim import AdamW
from mmlab.training.resume_proof import difference
from tests.tiny_shards import make_shards, settings, sources
from tests.tiny_trainer import Keys, Kill, KillAt, run

STEPS, VAL_EVERY, DECAY = 12, 4, 0.6


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.eye, self.ear, self.still = nn.Linear(1, 4), nn.Linear(4, 1), nn.Linear(1, 1)


class Recorder(Stage):
    """Keeps its weights after each step and those that each validation saw."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__(StageConfig(trainable=["eye", "ear"]), Parts().to(dtype), AdamW(AdamWConfig()))
        self.after: dict[int, dict[str, torch.Tensor]] = {0: self.weights()}
        self.validated: dict[int, dict[str, torch.Tensor]] = {}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.after[self.global_step] = self.weights()
        x = (batch["x"] / 97).to(self.model.eye.weight.dtype)
        loss = (self.model.ear(torch.relu(self.model.eye(x))) - 1).float().square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated[self.global_step] = self.weights()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


def train(root: Path, folder: Path, *callbacks: L.Callback, dtype: torch.dtype = torch.float32) -> Recorder:
    """Resume the run in `folder`, or start it: two micro-batches a step."""
    folder.mkdir(exist_ok=True)
    data = ShardDataModule(settings(train=sources(root / "a"), val=sources(root / "a")), Keys())
    stage = Recorder(dtype)
    torch.manual_seed(1)
    run(stage, data, folder, STEPS, callbacks, val_every=VAL_EVERY)
    return stage


def last_state(folder: Path) -> dict[str, Any]:
    return checkpoint_io.read(folder / "checkpoints" / f"step-{STEPS}")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    make_shards(root / "a", 21)
    return root


@pytest.fixture(scope="module")
def straight(root):
    stage = train(root, root / "straight", EMA(EMAConfig(decay=DECAY)))
    return stage, last_state(root / "straight")


def averages(stage: Recorder, own: dict[str, torch.Tensor], decay: float) -> list[dict[str, torch.Tensor]]:
    """The average after each step, computed from the weights that the stage had."""
    found = [{name: value.double() for name, value in stage.after[0].items()}]
    for step in range(1, STEPS + 1):
        weights = stage.after[step] if step < STEPS else {**stage.after[0], **own}
        d = min(decay, (1 + step) / (10 + step))
        found.append({name: d * value + (1 - d) * weights[name].double() for name, value in found[-1].items()})
    return found


def test_the_average_is_the_formulas(straight):
    stage, state = straight
    own = {name.removeprefix("model."): value for name, value in state["state_dict"].items()}
    expected = averages(stage, own, DECAY)
    ema = state["callbacks"]["EMA"]
    assert ema["updates"] == STEPS
    assert set(ema["average"]) == {"eye.weight", "eye.bias", "ear.weight", "ear.bias"}, "what learns, and no more"
    for name, value in ema["average"].items():
        torch.testing.assert_close(value.double(), expected[-1][name], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(value, own[name]), "an average that is no other than the weights shows nothing"
    for step in (4, 8, 12):
        for name, value in stage.validated[step].items():
            torch.testing.assert_close(value.double(), expected[step][name], rtol=1e-5, atol=1e-7)


def test_training_does_not_notice_and_the_run_leaves_the_average(root, tmp_path, straight):
    stage, state = straight
    plain = train(root, tmp_path)
    assert difference(last_state(tmp_path)["state_dict"], state["state_dict"]) is None
    for step, weights in plain.after.items():
        assert difference(weights, stage.after[step]) is None
    average = state["callbacks"]["EMA"]["average"]
    for name, value in stage.weights().items():
        assert torch.equal(value, average.get(name, plain.weights()[name]))


CUTS = {
    "within a step": ("start", 11),
    "first step": ("start", 0),
    "after a save": ("start", 12),
    "validation": ("validation", 4),
    "last validation": ("validation", 12),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_killed_run_has_the_same_average(root, tmp_path, straight, cut):
    with pytest.raises(Kill):
        train(root, tmp_path, KillAt(*CUTS[cut]), EMA(EMAConfig(decay=DECAY)))
    again = train(root, tmp_path, EMA(EMAConfig(decay=DECAY)))
    assert difference(last_state(tmp_path), straight[1]) is None
    assert difference(again.weights(), straight[0].weights()) is None, "the average is left behind"
    for step, weights in again.validated.items():
        assert difference(weights, straight[0].validated[step]) is None


def test_a_complete_run_that_is_started_again_leaves_the_average_too(root, tmp_path, straight):
    train(root, tmp_path, EMA(EMAConfig(decay=DECAY)))
    assert difference(train(root, tmp_path, EMA(EMAConfig(decay=DECAY))).weights(), straight[0].weights()) is None


class Look(L.Callback):
    """Keeps the weights at each validation's end, the model's own and the average, as sampling callbacks see them."""

    def __init__(self):
        self.own: dict[int, dict[str, torch.Tensor]] = {}
        self.average: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        with averaged(pl_module.model), averaged(pl_module.model):
            self.average[trainer.global_step] = pl_module.weights()
        self.own[trainer.global_step] = pl_module.weights()

    def on_validation_end(self, trainer, pl_module) -> None:
        with averaged(pl_module.model):
            self.average[trainer.global_step] = pl_module.weights()


@pytest.mark.parametrize("first", [True, False])
def test_callbacks_see_the_average_wherever_they_are_listed(root, tmp_path, straight, first):
    look, ema = Look(), EMA(EMAConfig(decay=DECAY))
    stage = train(root, tmp_path, *((look, ema) if first else (ema, look)))
    assert difference(stage.weights(), straight[0].weights()) is None
    for step in (4, 8, 12):
        assert difference(look.average[step], straight[0].validated[step]) is None
    for step, weights in look.own.items():
        assert difference(weights, straight[0].after[step]) is None, "the weights are the model's own again"
        assert step == 0 or difference(look.average[step], weights) is not None


def test_without_an_average_nothing_changes():
    model = Parts()
    before = {name: value.clone() for name, value in model.named_parameters()}
    with averaged(model):
        assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_it_averages_in_float32_what_is_less(root, tmp_path):
    ema = EMA(EMAConfig(decay=0.999))
    stage = train(root, tmp_path, ema, dtype=torch.bfloat16)
    assert {value.dtype for value in ema.average.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in ema.average.values())
    assert {value.dtype for value in stage.weights().values()} == {torch.bfloat16}


def test_some_parts_alone(root, tmp_path, straight):
    ema = EMA(EMAConfig(decay=DECAY, parts=["ear"]))
    stage = train(root, tmp_path, ema)
    assert set(ema.average) == {"ear.weight", "ear.bias"}
    own = last_state(tmp_path)["state_dict"]
    assert torch.equal(stage.weights()["eye.weight"], own["model.eye.weight"])
    assert torch.equal(stage.weights()["ear.weight"], straight[0].weights()["ear.weight"])


@pytest.mark.parametrize(
    ("parts", "says"), [(["eyes"], "Did you mean 'eye'"), (["still"], "'still', which is not trained")]
)
def test_parts_that_do_not_learn_are_refused(root, tmp_path, parts, says):
    with pytest.raises(ConfigError, match=says):
        train(root, tmp_path, EMA(EMAConfig(parts=parts)))


def test_a_decay_out_of_range_is_refused():
    with pytest.raises(ConfigError, match="'decay' must be below 1"):
        EMAConfig(decay=1.0)


def test_the_average_of_other_weights_is_refused(root, tmp_path):
    with pytest.raises(Kill):
        train(root, tmp_path, KillAt("start", 11), EMA(EMAConfig(decay=DECAY)))
    with pytest.raises(RunError, match=r"averages other weights than this run, such as eye\.bias"):
        train(root, tmp_path, EMA(EMAConfig(decay=DECAY, parts=["ear"])))


def test_an_average_that_is_not_finite_is_refused(root, tmp_path):
    train(root, tmp_path, EMA(EMAConfig(decay=DECAY)))
    newest = tmp_path / "checkpoints" / f"step-{STEPS}"
    state = checkpoint_io.read(newest)
    state["callbacks"]["EMA"]["average"]["eye.bias"][0] = torch.nan
    checkpoint_io.write(state, newest)
    with pytest.raises(RunError, match=f"step-{STEPS} has NaN or infinity in the average; remove it to resume"):
        train(root, tmp_path, EMA(EMAConfig(decay=DECAY)))
