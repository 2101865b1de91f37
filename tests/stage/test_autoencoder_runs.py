"""Whole runs of autoencoders: killed, on several ranks, and with a collapsed codebook."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from mmlab.config.errors import RunError
from mmlab.stage.autoencoder_training import AutoencoderTraining
from mmlab.training import checkpoint_io
from mmlab.training.resume_proof import difference
from tests.stage.tiny_adversarial import data_of, stage, train
from tests.stage.tiny_stage import fit
from tests.tiny_shapes import make_shapes
from tests.tiny_trainer import Kill, KillAt


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), train=12, val=5)


def run(root: Path, folder: Path, *callbacks: L.Callback) -> AutoencoderTraining:
    """Nine steps of two micro-batches; the discriminator starts at step 4, codes are revived at 4 and 8."""
    module = stage("vq", adversarial_start=4, codebook={"codes": 64, "revive_after": 4})
    train(module, data_of(module, root, micro_batch=4), folder, 9, callbacks)
    return module


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return run(root, folder), checkpoint_io.read(folder / "checkpoints" / "step-9")


@pytest.mark.parametrize("kill", [KillAt("end", 9), KillAt("end", 17), KillAt("train end", 0)])
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


STEPS = 8


@pytest.fixture
def settled(monkeypatch):
    """The guard looks from the second validation on."""
    monkeypatch.setattr("mmlab.stage.autoencoder_loss.SETTLED_STEPS", STEPS)


def collapsed(**codebook) -> AutoencoderTraining:
    """All codes but one lie where no latent will come."""
    module = stage("vq", codebook={"codes": 32, "normalize": False, **codebook}, adversarial_weight=0.0)
    book: torch.Tensor = module.model.first_stage.quantizer.codebook
    with torch.no_grad():
        book[1:] += 1000
    return module


@pytest.mark.usefixtures("settled")
def test_a_collapse_is_reported_with_its_remedy(root, tmp_path):
    module = collapsed()
    with pytest.raises(RunError, match=r"has collapsed: its 32 codes have a perplexity of 1\.0 .*revive_after=100"):
        train(module, data_of(module, root), tmp_path, STEPS)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("codebook", [{}, {"ema": 0.5}])
def test_the_remedy_restores_use(root, tmp_path, codebook):
    module = collapsed(revive_after=2, **codebook)
    metrics = train(module, data_of(module, root), tmp_path, STEPS)
    assert metrics["val/perplexity"] > 4 and metrics["val/code_use"] > 0.25
    assert module.model.first_stage.quantizer.codebook.abs().max() < 100
