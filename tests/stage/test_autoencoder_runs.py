"""An autoencoder's run that is killed, or on several ranks, is the run that is not."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from mmlab.stage.autoencoder import AutoencoderTraining
from mmlab.training import checkpoint_io
from mmlab.training.resume_proof import difference
from tests.stage.tiny_adversarial import data_of, stage, train
from tests.stage.tiny_stage import fit
from tests.tiny_shapes import make_shapes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), train=12, val=5)


class Kill(BaseException):
    pass


class KillAfter(L.Callback):
    def __init__(self, step: int, hook: str):
        self.step, self.hook = step, hook

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.hook == "batch" and trainer.global_step == self.step:
            raise Kill

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.hook == "end":
            raise Kill


def run(root: Path, folder: Path, *callbacks: L.Callback) -> AutoencoderTraining:
    """Nine steps of two micro-batches; the discriminator starts at step 4, codes are revived at 4 and 8."""
    module = stage("vq", adversarial_start=4, codebook={"codes": 64, "revive_after": 4})
    train(module, data_of(module, root, micro_batch=4), folder, 9, callbacks)
    return module


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return run(root, folder), checkpoint_io.read(folder / "checkpoints" / "step-9")


@pytest.mark.parametrize("kill", [KillAfter(5, "batch"), KillAfter(9, "batch"), KillAfter(9, "end")])
def test_a_run_that_was_killed_is_the_same_run(root, tmp_path, straight, kill):
    with pytest.raises(Kill):
        run(root, tmp_path, kill)
    again = run(root, tmp_path)
    whole, state = straight
    assert difference(checkpoint_io.read(tmp_path / "checkpoints" / "step-9"), state) is None
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert again.model.first_stage.measured
    uses = state["state_dict"]["model.first_stage.quantizer.uses"]
    assert uses.sum() == 8 * 16, "since codes were revived after step 8, those of one global batch"


class Ranks(L.Callback):
    """Saves each rank's weights at the end, and the steps that the optimizer took with them."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        weights = dict(pl_module.model.named_parameters())
        state = trainer.optimizers[0].state
        values = {name: p.detach().clone() for name, p in weights.items()}
        steps = {name: int(state[p]["step"]) for name, p in weights.items()}
        torch.save([values, steps], self.folder / f"{trainer.global_rank}.pt")


def test_ranks_stay_alike_before_and_after_the_start(root, tmp_path):
    module = stage("vq", adversarial_start=2, codebook={"codes": 64, "revive_after": 2})
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    fit(module, data_of(module, root, micro_batch=2), 4, devices=2, callbacks=[Ranks(tmp_path)])
    (a, steps), (b, _) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(not torch.equal(a[name], before[name]) for name in a if name.endswith("weight"))
    for name, count in steps.items():
        assert count == (2 if name.startswith("discriminator.") else 4), f"{name}: Adam saw it before its start"


class Metrics(L.Callback):
    """Saves what the first rank has logged of a validation."""

    def __init__(self, file: Path):
        self.file = file

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            logged = trainer.callback_metrics.items()
            torch.save({name: float(value) for name, value in logged if name.startswith("val/")}, self.file)


def test_ranks_validate_as_one_process_does(tmp_path):
    root, found = make_shapes(tmp_path / "shapes", train=12, val=6), []
    for devices in (1, 2):
        module, file = stage("vq", lr=1e-6, adversarial_weight=0, codebook={"codes": 64}), tmp_path / f"{devices}.pt"
        fit(module, data_of(module, root, micro_batch=2), 2, devices=devices, callbacks=[Metrics(file)])
        found.append(torch.load(file, weights_only=True))
    assert found[1] == pytest.approx(found[0], rel=1e-3) and found[0]["val/perplexity"] > 2
