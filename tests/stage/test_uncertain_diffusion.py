"""The diffusion stage with learned weights of the noise levels: in training alone, on ranks, and resumed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlab.config.compose import compose
from mmlab.config.errors import ConfigError
from mmlab.diffusion.config import DiffusionConfig
from mmlab.diffusion.process import Diffusion, NoiseProcess
from mmlab.model.config import DiffusionModelConfig, NoiseUncertaintyConfig
from mmlab.model.uncertainty import NoiseUncertainty
from mmlab.training import checkpoint_io
from mmlab.training.resume_proof import difference
from tests.diffusion.gaussian import diffusion, edm, flow_matching
from tests.stage.tiny_diffusion import diffusion_model, diffusion_stage, image_data, make_pictures
from tests.stage.tiny_stage import fit
from tests.tiny_trainer import Kill, KillAt, run

PARTS = ["denoiser", "conditioner", "uncertainty"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def uncertain_stage(process: NoiseProcess | None = None, learned: float = 0.0, **options: Any) -> Any:
    model = diffusion_model()
    model.uncertainty = NoiseUncertainty(NoiseUncertaintyConfig())
    torch.nn.init.constant_(model.uncertainty.weight, learned)
    return diffusion_stage(model, process, **{"trainable": PARTS, **options})


@pytest.mark.parametrize("process", [diffusion(zero_terminal_snr=True, target="v"), flow_matching(), edm()])
def test_training_weights_what_validation_and_the_log_do_not(pictures, process):
    stage, seen = uncertain_stage(process, learned=0.01), list[dict[str, Any]]()
    data = image_data(stage, pictures)
    data.plan(1)
    batch = stage.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)
    plain = stage.loss(batch, stage.model.conditioner.dropout)
    t = process.draw(batch["seeds"], (1,))[0]
    u = stage.model.uncertainty.log_loss(process.snr(t))
    stage.trainer = type("Trainer", (), {"global_step": 0, "world_size": 1})()
    weighted = stage.training_step(batch, 0)
    torch.testing.assert_close(weighted, (plain / u.exp() + u).mean())
    means, count = stage.train_means.finish(1)
    assert count == 8 and means["loss"] == pytest.approx(plain.mean().item())
    assert means["weighted_loss"] == pytest.approx(weighted.item()) != means["loss"]
    stage.log = lambda name, value, **options: seen.append({name: value})
    stage.validation_step(batch, 0)
    torch.testing.assert_close(seen[0]["val/loss"], stage.loss(batch, 0.0).mean())


def test_at_the_start_the_loss_is_the_plain_one(pictures):
    """The denoiser's first step is then the same, too, and u has learned something."""
    states = []
    for stage in (uncertain_stage(), diffusion_stage()):
        fit(stage, image_data(stage, pictures), 1)
        states.append(stage.model.state_dict())
    weight = states[0].pop("uncertainty.weight")
    assert weight.abs().max() > 0 and states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_u_becomes_the_logarithm_of_the_mean_loss_at_each_level():
    torch.manual_seed(0)
    uncertainty = NoiseUncertainty(NoiseUncertaintyConfig())
    optimizer = torch.optim.Adam(uncertainty.parameters(), lr=3e-3)
    process = diffusion("cosine")

    def expected(t: Tensor) -> Tensor:
        return 0.02 + 2 * (t / 1000) ** 3

    for _ in range(400):
        t = torch.randint(1000, (128,))
        losses = expected(t) * torch.rand(128) * 2
        optimizer.zero_grad()
        uncertainty(losses, process.snr(t)).mean().backward()
        optimizer.step()
    t = torch.arange(100, 1000, 50)
    u = uncertainty.log_loss(process.snr(t)).detach()
    torch.testing.assert_close(u, expected(t).log(), rtol=0, atol=0.4)
    assert torch.isfinite(uncertainty.log_loss(torch.tensor([0.0, float("inf")]))).all()


def test_micro_batches_and_ranks_learn_what_one_learns(pictures):
    def train(micro_batch: int, devices: int) -> dict[str, Tensor]:
        stage = uncertain_stage()
        fit(stage, image_data(stage, pictures, micro_batch=micro_batch), 3, devices)
        return stage.model.state_dict()

    expected, found = train(8, 1), train(2, 2)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_run_that_was_killed_is_the_same_run(pictures, tmp_path):
    def go(folder: str, *callbacks: Any) -> Any:
        stage = uncertain_stage(edm())
        run(stage, image_data(stage, pictures, micro_batch=4), tmp_path / folder, 6, callbacks)
        return checkpoint_io.read(tmp_path / folder / "checkpoints" / "step-6")

    whole = go("whole")
    with pytest.raises(Kill):
        go("killed", KillAt("end", 8))
    assert difference(go("killed"), whole) is None
    assert whole["state_dict"]["model.uncertainty.weight"].abs().max() > 0


def test_it_is_a_part_that_only_training_uses():
    cfg = compose("train", ["experiment=ldm/class_tiny", "process=edm", "model/uncertainty=edm2", "trainer=cpu"])
    assert cfg.stage.trainable == PARTS and cfg.model.uncertainty.features == 128
    assert "uncertainty" in DiffusionModelConfig.training_only


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: uncertain_stage(Diffusion(DiffusionConfig(min_snr_gamma=5.0))), "which would have no effect"),
        (lambda: uncertain_stage(trainable=PARTS[:2]), "stage.trainable must name uncertainty"),
    ],
)
def test_what_has_no_effect_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
