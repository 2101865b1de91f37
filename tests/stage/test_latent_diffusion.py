"""The diffusion stage learns the same from pictures and cached latents, on any ranks, and refuses what it must."""

from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.config import AspectBucketsConfig, ImageDataConfig
from mmlab.data.shard_files import ShardWriter
from mmlab.diffusion.config import DiffusionConfig, FlowMatchingConfig
from mmlab.diffusion.flow import FlowMatching
from mmlab.diffusion.process import Diffusion
from mmlab.model.conditioner import ClassCondition, NoCondition
from mmlab.model.config import ClassConditionConfig, DiTConfig, UNetConfig
from mmlab.model.denoiser import DiffusionModel, UNet
from mmlab.model.dit import DiT
from mmlab.model.first_stage import Identity
from tests.stage.tiny_diffusion import (
    NAMES,
    SIZE,
    TinyFirstStage,
    diffusion_model,
    diffusion_stage,
    image_data,
    make_latents,
    make_pictures,
)
from tests.stage.tiny_stage import fit
from tests.tiny_files import png


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def cached(tmp_path_factory, pictures):
    return make_latents(tmp_path_factory.mktemp("latents"), diffusion_model(), pictures, flip=True)


def batches(stage: Any, index: Any, count: int = 2, **options: Any) -> list[dict[str, Any]]:
    data = image_data(stage, index, **options)
    data.plan(count)
    micro = count * data.accumulation(1)
    return [stage.on_before_batch_transfer(batch, 0) for batch in islice(data.train_dataloader(), micro)]


def test_cached_latents_give_the_loss_of_the_pictures(pictures, cached):
    stage = diffusion_stage()
    pairs = zip(batches(stage, pictures), batches(stage, cached, latents=True), strict=True)
    for of_pictures, of_latents in pairs:
        assert "pixel_values" not in of_latents and of_latents["seeds"] == of_pictures["seeds"]
        torch.testing.assert_close(stage.latents(of_latents), stage.latents(of_pictures), rtol=0, atol=1e-6)
        expected = stage.loss(of_pictures, 0.5)
        torch.testing.assert_close(stage.loss(of_latents, 0.5), expected, rtol=1e-6, atol=1e-7)
        assert expected.shape == (8,) and expected.dtype == torch.float32
    unflipped = batches(stage, pictures, flip=False)[0]
    assert not torch.allclose(stage.latents(unflipped), stage.latents(batches(stage, pictures)[0]))


def test_latents_have_unit_variance_and_are_drawn_from_their_posterior(pictures):
    model = diffusion_model()
    stage = diffusion_stage(model)
    batch = batches(stage, pictures)[0]
    pixels = batch["pixel_values"].float() / 127.5 - 1
    posterior = model.first_stage.encode(pixels)
    mean, std = model.first_stage.latent_mean, model.first_stage.latent_std
    assert posterior.logvar is not None
    drawn = (stage.latents(batch) * std[:, None, None] + mean[:, None, None] - posterior.mean) / (
        0.5 * posterior.logvar
    ).exp()
    assert drawn.std().item() == pytest.approx(1, abs=0.15) and abs(drawn.mean().item()) < 0.15
    again = stage.latents({**batch, "seeds": batch["seeds"][::-1]})
    assert not torch.allclose(again, stage.latents(batch))


def test_the_loss_is_the_process_loss_of_the_keyed_draws(pictures):
    weighted, flow = Diffusion(DiffusionConfig(target="v", min_snr_gamma=5.0)), FlowMatching(FlowMatchingConfig())
    for process, kind in ((weighted, "l2"), (flow, "l2"), (flow, "l1")):
        stage = diffusion_stage(process=process, loss=kind)
        batch = batches(stage, pictures)[0]
        x_0 = stage.latents(batch)
        t, noise = process.draw(batch["seeds"], x_0.shape[1:])
        x_t = process.add_noise(x_0, noise, t)
        condition = stage.model.conditioner({"labels": batch["labels"]})
        prediction = stage.model.denoiser(x_t, process.model_time(t), condition)
        error = prediction - process.target_of(x_0, noise, t)
        error = error.abs() if kind == "l1" else error.square()
        expected = process.weight(t) * error.mean((1, 2, 3))
        torch.testing.assert_close(stage.loss(batch, 0.0), expected.float(), rtol=1e-5, atol=1e-6)


def test_conditions_are_dropped_as_often_as_the_conditioner_says(pictures):
    stage = diffusion_stage()
    dropped = []

    def note(module: Any, args: Any) -> None:
        dropped.extend(args[1].tolist())

    handle = stage.model.conditioner.register_forward_pre_hook(note)
    batch = batches(stage, pictures)[0]
    row = {name: batch[name][:1] for name in ("pixel_values", "labels")}
    many = {name: value.repeat(400, *[1] * (value.dim() - 1)) for name, value in row.items()}
    for dropout in (0.0, 0.3, 1.0):
        stage.loss({**many, "seeds": list(range(400))}, dropout)
        assert sum(dropped) / 400 == pytest.approx(dropout, abs=0.07 if dropout == 0.3 else 0)
        if dropout == 0.3:
            times, chosen = stage.process.draw(range(400), (1,))[0].double(), torch.tensor(dropped)
            gone, given = (times[rows].mean().item() for rows in (chosen, ~chosen))
            assert gone == pytest.approx(given, rel=0.2), "at any timestep"
        dropped.clear()
    handle.remove()
    stage.loss({**many, "seeds": list(range(400))}, 1.0).mean().backward()
    assert stage.model.conditioner.embedding.weight.grad.abs().sum(1).nonzero().tolist() == [[len(NAMES)]]


@pytest.mark.parametrize(("latents", "micro_batch", "devices"), [(False, 2, 1), (True, 2, 1), (False, 2, 2)])
def test_micro_batches_and_ranks_learn_what_one_learns(pictures, cached, latents, micro_batch, devices):
    def train(micro_batch: int, devices: int) -> tuple[dict[str, torch.Tensor], list[float]]:
        stage = diffusion_stage()
        data = image_data(stage, cached if latents else pictures, latents, micro_batch=micro_batch)
        watch = fit(stage, data, 3, devices)
        return stage.model.state_dict(), watch.losses

    expected, losses = train(8, 1)
    found, found_losses = train(micro_batch, devices)
    if devices == 1:  # the losses of forked ranks stay with them
        assert found_losses == pytest.approx(losses, rel=1e-5) and len(set(losses)) == 3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_pictures_and_cached_latents_are_trained_to_the_same_weights(pictures, cached):
    states = []
    for latents, index in ((False, pictures), (True, cached)):
        stage = diffusion_stage()
        before = {name: value.clone() for name, value in stage.model.state_dict().items()}
        fit(stage, image_data(stage, index, latents), 3)
        states.append(stage.model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(value, before[name]) is name.startswith("first_stage"), name


def test_validation_sees_every_condition_and_the_same_noise_each_time(pictures):
    stage, seen = diffusion_stage(), []
    loss = stage.loss

    def watched(batch: Any, dropout: float) -> torch.Tensor:
        losses = loss(batch, dropout)
        if not stage.trainer.training:
            seen.append((dropout, batch["seeds"], losses.mean().item()))
        return losses

    stage.loss = watched
    stage.optim.config.lr = stage.optim.config.min_lr = 0.0
    fit(stage, image_data(stage, pictures), 2, val_every=1)
    assert len(seen) == 4 and seen[:2] == seen[2:]
    assert {dropout for dropout, _, _ in seen} == {0.0}
    expected = sum(value for _, _, value in seen[:2]) / 2
    assert float(stage.trainer.callback_metrics["val/loss"]) == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_holds_what_learns(pictures):
    stage = diffusion_stage()
    checkpoint = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(checkpoint)
    parts = {name.split(".")[1] for name in checkpoint["state_dict"]}
    assert parts == {"denoiser", "conditioner"}


def test_statistics_that_no_run_has_stored_are_measured_once(pictures, monkeypatch):
    def unmeasured() -> Any:
        torch.manual_seed(0)
        stage = diffusion_stage(diffusion_model(TinyFirstStage(measured=False)))
        assert stage.completed == ["first_stage"]
        return stage

    stages = [unmeasured(), unmeasured()]
    for stage, micro_batch in zip(stages, (8, 4), strict=True):
        fit(stage, image_data(stage, pictures, flip=False, micro_batch=micro_batch), 2)
    first, second = (stage.model.first_stage for stage in stages)
    batch = torch.cat([stages[0].latents(batch) for batch in batches(stages[0], pictures, flip=False)])
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=0.15)
    torch.testing.assert_close(batch.std((0, 2, 3)), torch.ones(2), rtol=0, atol=0.15)
    assert first.measured and torch.equal(first.latent_std, second.latent_std)
    checkpoint: dict[str, Any] = {"state_dict": stages[0].state_dict()}
    stages[0].on_save_checkpoint(checkpoint)
    resumed = unmeasured()
    resumed.load_state_dict(checkpoint["state_dict"], strict=False)
    monkeypatch.setattr("mmlab.stage.latent_diffusion.measure_latents", lambda *_: pytest.fail("measured again"))
    fit(resumed, image_data(resumed, pictures), 2)
    assert torch.equal(resumed.model.first_stage.latent_mean, first.latent_mean)
    assert diffusion_stage().completed == []


def test_a_published_denoiser_keeps_the_latents_that_it_has_learned(tmp_path, pictures, monkeypatch):
    stage = diffusion_stage(diffusion_model(TinyFirstStage(measured=False)))
    stage.model.denoiser.settings = SimpleNamespace(source=str(tmp_path))
    stage.on_filled({})
    assert stage.model.first_stage.latent_std.tolist() == [1, 1] and stage.completed == ["first_stage"]
    monkeypatch.setattr("mmlab.stage.latent_diffusion.measure_latents", lambda *_: pytest.fail("measured"))
    fit(stage, image_data(stage, pictures), 1)
    trained = diffusion_stage(diffusion_model(TinyFirstStage(measured=False)))
    trained.model.denoiser.settings = stage.model.denoiser.settings
    trained.on_filled({"denoiser": tmp_path})  # of a run, whose first stage another one replaces
    assert not trained.model.first_stage.measured


def test_the_scheduler_of_a_published_denoiser_is_compared(stable_diffusion):
    stage = diffusion_stage()
    stage.model.denoiser.settings = SimpleNamespace(source=str(stable_diffusion))
    with pytest.raises(ConfigError, match=r"schedule=scaled_linear, as its scheduler says, .* set process\.schedule"):
        stage.on_filled({})
    stage.on_filled({"denoiser": stable_diffusion})
    stage.model.denoiser.settings.source += "/unet"
    stage.on_filled({})


def picky(reduction: int) -> Any:
    """A stage whose denoiser takes sides that `reduction` divides."""
    stage = diffusion_stage()
    stage.model.denoiser.reduction = reduction
    return stage


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: diffusion_stage(diffusion_model(TinyFirstStage(measured=False))).collate(
                ImageDataConfig(size=SIZE, latents=True)
            ),
            "statistics are not known, .* train with data.latents=false",
        ),
        (lambda: diffusion_stage(trainable=["denoiser", "first_stage"]), "stage=autoencoder trains it"),
        (lambda: diffusion_stage(trainable=["denoise"]), "Did you mean 'denoiser'"),
        (
            lambda: diffusion_stage().collate(ImageDataConfig(size=SIZE + 1)),
            "must divide by the first stage's factor 2",
        ),
        (lambda: picky(4).collate(ImageDataConfig(size=SIZE + 4)), "latents of 6 x 6, .* take a multiple of 8"),
        (lambda: diffusion_stage(trainable=["denoiser"]), "conditioner has random weights and is frozen"),
        (lambda: diffusion_stage(loss="l3"), "'loss' cannot be 'l3'"),
        (
            lambda: diffusion_stage(process=Diffusion(DiffusionConfig(min_snr_gamma=5)), loss="l1"),
            "min_snr_gamma weights squared",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_latents_of_another_first_stage_are_refused(cached):
    other: Any = diffusion_model()
    with torch.no_grad():
        other.first_stage.there.weight.mul_(1.1)
    with pytest.raises(DataError, match=r"were made by the first stage .* encode the images again"):
        batches(diffusion_stage(other), cached, latents=True)
    rescaled = diffusion_model()
    rescaled.first_stage.set_statistics(torch.zeros(2), torch.ones(2))
    with pytest.raises(DataError, match="were made by the first stage"):
        batches(diffusion_stage(rescaled), cached, latents=True)


def test_latents_of_pictures_in_another_form_are_refused(cached):
    with pytest.raises(DataError, match=rf"with data.size={SIZE} data.aspect=crop, but .* data.aspect=stretch: set"):
        batches(diffusion_stage(), cached, latents=True, aspect="stretch")


def test_pixels_need_no_first_stage(pictures):
    stage = diffusion_stage(diffusion_model(Identity(), NoCondition()), trainable=["denoiser"])
    batch = batches(stage, pictures, flip=False)[0]
    assert set(batch) == {"pixel_values", "seeds", "keys", "stats", "bad"}
    assert torch.equal(stage.latents(batch), batch["pixel_values"].float() / 127.5 - 1)
    watch = fit(stage, image_data(stage, pictures), 12)
    assert sum(watch.losses[-4:]) < sum(watch.losses[:4])


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_buckets_of_images_are_learned_on_any_micro_batches(tmp_path, kind):
    def model() -> DiffusionModel:
        torch.manual_seed(0)
        unet = partial(UNet, UNetConfig(architecture={"block_out_channels": [8, 8], "norm_num_groups": 4}))
        dit = partial(DiT, DiTConfig(depth=1, width=8, heads=2, patch=2))
        classes = ClassCondition(ClassConditionConfig(classes=NAMES, width=8))
        return DiffusionModel(TinyFirstStage(), classes, unet if kind == "unet" else dit)

    with ShardWriter(tmp_path / "s", 6, quiet=True) as writer:
        for i, sides in enumerate([(20, 10), (12, 12), (10, 18)] * 6):
            writer.write(f"s{i}", {"png": png(*sides, color=f"hsl({9 * i},90%,40%)"), "json": {"class": NAMES[i % 3]}})
    buckets, losses = AspectBucketsConfig(max_aspect=3, step=4), []
    for micro_batch in (4, 2):
        stage = diffusion_stage(model())
        watch = fit(stage, image_data(stage, writer.index, global_batch=4, micro_batch=micro_batch, buckets=buckets), 3)
        losses.append(watch.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(set(losses[0])) == 3
    shapes = {tuple(batch["pixel_values"].shape[2:]) for batch in batches(stage, writer.index, 9, buckets=buckets)}
    assert shapes == {(8, 8), (4, 12), (12, 4)}
    with pytest.raises(ConfigError, match=r"step=2 must be a multiple of 4, by which the model divides"):
        image_data(stage, writer.index, buckets=AspectBucketsConfig(max_aspect=3, step=2))
