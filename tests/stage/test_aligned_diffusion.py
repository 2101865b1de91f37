"""The diffusion stage with representation alignment: up to its stop, on ranks, resumed, and beside cached latents."""

from functools import partial
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from mmlab.config.build import build
from mmlab.config.compose import compose
from mmlab.config.errors import ConfigError, DataError
from mmlab.model.alignment import Alignment, features_of
from mmlab.model.conditioner import ClassCondition
from mmlab.model.config import AlignmentConfig, ClassConditionConfig, DiTConfig
from mmlab.model.denoiser import DiffusionModel
from mmlab.model.dit import DiT
from mmlab.stage.assembly import build_stage, restore
from mmlab.training import checkpoint_io
from mmlab.training.artifacts import describe, describe_frozen, save_parts
from mmlab.training.config import CSVLogConfig
from mmlab.training.csv_log import CSVLog
from mmlab.training.filling import fill_parts
from mmlab.training.resume_proof import difference
from tests.model import tiny
from tests.stage.tiny_diffusion import (
    NAMES,
    TinyFirstStage,
    diffusion_model,
    diffusion_stage,
    image_data,
    make_latents,
    make_pictures,
)
from tests.stage.tiny_stage import fit
from tests.tiny_trainer import Kill, KillAt, run

PARTS = ["denoiser", "conditioner", "alignment"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def aligned_model() -> DiffusionModel:
    """Two blocks on 4 x 4 tokens of 8-pixel pictures, the first of them aligned with 2 x 2 patches."""
    torch.manual_seed(0)
    return DiffusionModel(
        TinyFirstStage(),
        ClassCondition(ClassConditionConfig(classes=NAMES, width=8, dropout=0.5)),
        partial(DiT, DiTConfig(depth=2, width=8, heads=2, patch=1)),
        tiny.vision("dinov2", feature_layer=-1),
        partial(Alignment, AlignmentConfig(width=6)),
    )


def aligned_stage(**options: Any) -> Any:
    return diffusion_stage(aligned_model(), **{"trainable": PARTS, **options})


def first_batch(stage: Any, index: Any, **options: Any) -> dict[str, Any]:
    data = image_data(stage, index, **options)
    data.plan(1)
    return stage.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)


def step_loss(stage: Any, batch: dict[str, Any], step: int = 0) -> Tensor:
    stage.trainer = type("Trainer", (), {"global_step": step, "world_size": 1})()
    return stage.training_step(batch, 0)


def watched(stage: Any) -> list[tuple[int, int]]:
    """(step, images) of each call of the vision encoder."""
    calls: list[tuple[int, int]] = []
    patches = stage.model.vision.patches

    def watch(pixels: Tensor) -> Tensor:
        calls.append((stage.trainer.global_step, len(pixels)))
        return patches(pixels)

    stage.model.vision.patches = watch
    return calls


def test_the_similarity_is_subtracted_with_its_weight(pictures):
    stage = aligned_stage(alignment_weight=0.25)
    batch = first_batch(stage, pictures)
    with stage.model.alignment.hidden_of(stage.model.denoiser) as hidden:
        plain = stage.loss(batch, stage.model.conditioner.dropout)
    similarity = stage.model.alignment(hidden[0], features_of(stage.model.vision, batch["pixel_values"]), (4, 4))
    torch.testing.assert_close(step_loss(stage, batch), plain.mean() - 0.25 * similarity.mean())
    means, count = stage.train_means.finish(1)
    assert count == 8 and means["loss"] == pytest.approx(float(plain.mean()))
    assert means["alignment"] == pytest.approx(float(similarity.mean()))


def test_it_learns_to_align_and_the_encoder_stays(pictures):
    stage, seen = aligned_stage(alignment_weight=5.0), []
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    log_dict = stage.log_dict
    stage.log_dict = lambda values, **options: (seen.append(dict(values)), log_dict(values, **options))
    fit(stage, image_data(stage, pictures), 12)
    similarities = [float(values["train/alignment"]) for values in seen if "train/alignment" in values]
    assert len(similarities) == 12 and similarities[-1] > similarities[0] + 0.3
    changed = {name.split(".")[0] for name, value in stage.model.state_dict().items() if not value.equal(before[name])}
    assert changed == set(PARTS) and not stage.model.vision.training
    checkpoint: dict[str, Any] = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(checkpoint)
    assert {name.split(".")[1] for name in checkpoint["state_dict"]} == set(PARTS)


def test_after_the_stop_the_encoder_is_not_run_and_the_projector_stays(pictures, tmp_path):
    stage, states = aligned_stage(alignment_stop=2), []
    calls = watched(stage)
    stage.on_train_batch_end = lambda *_: states.append(stage.model.alignment.projector[0].weight.detach().clone())
    log = CSVLog(CSVLogConfig(save_dir=str(tmp_path)))
    fit(stage, image_data(stage, pictures), 4, logger=log, log_every_n_steps=1)
    assert calls == [(0, 8), (1, 8)]
    assert [step for step, row in log.rows.items() if "train/alignment" in row] == [1, 2] and len(log.rows) == 4
    assert not states[0].equal(states[1]) and states[1].equal(states[2]) and states[2].equal(states[3])
    plain = diffusion_stage(aligned_model(), trainable=PARTS)
    batch = first_batch(plain, pictures)
    stopped = step_loss(aligned_stage(alignment_stop=2), batch, step=2)
    assert stopped.equal(plain.loss(batch, plain.model.conditioner.dropout).mean())


def test_micro_batches_of_ranks_learn_what_one_batch_learns(pictures):
    def train(micro_batch: int, devices: int) -> dict[str, Tensor]:
        stage = aligned_stage(alignment_stop=2)
        fit(stage, image_data(stage, pictures, micro_batch=micro_batch), 3, devices)
        return stage.model.state_dict()

    expected, found = train(8, 1), train(2, 2)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_run_that_was_killed_after_its_stop_and_resumed_before_it_is_the_same_run(pictures, tmp_path):
    def go(folder: str, *callbacks: Any) -> Any:
        stage = aligned_stage(alignment_stop=4)
        run(stage, image_data(stage, pictures, micro_batch=4), tmp_path / folder, 6, callbacks)
        return checkpoint_io.read(tmp_path / folder / "checkpoints" / "step-6")

    whole = go("whole")
    with pytest.raises(Kill):
        go("killed", KillAt("end", 9))  # of step 5; step 3 is saved
    assert difference(go("killed"), whole) is None
    assert not any("vision" in name for name in whole["state_dict"])


def test_kept_images_are_read_beside_their_latents(pictures, tmp_path):
    cached = make_latents(tmp_path, diffusion_model(), pictures, flip=True, keep_images=True)
    bare = make_latents(tmp_path / "bare", diffusion_model(), pictures, flip=True)
    losses = []
    for index, latents in ((pictures, False), (cached, True)):
        stage = aligned_stage()
        losses.append(step_loss(stage, first_batch(stage, index, latents=latents)))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match=r"no images beside its latents; encode with --keep-images, or set data.lat"):
        first_batch(aligned_stage(), bare, latents=True)
    plain = diffusion_stage()
    assert "pixel_values" not in first_batch(plain, cached, latents=True)


def composed(*overrides: str) -> Any:
    parts = ["model/alignment=repa_tiny", "model/vision=siglip_tiny", "trainer=cpu", *overrides]
    return compose("train", ["experiment=ldm/class_tiny", *parts])


def test_a_run_is_composed_and_restored_without_what_only_training_uses(tmp_path):
    small = ["model/first_stage=identity", "model/denoiser=dit_tiny", "model.denoiser.depth=1"]
    cfg = composed(f"run.root={tmp_path}", f"stage.init_from=[{tmp_path / 'eye'}]", *small)
    assert cfg.stage.trainable == PARTS and cfg.stage.alignment_weight == 0.5
    vision = build(cfg.model.vision)
    save_parts(torch.nn.ModuleDict({"vision": vision}), ["vision"], tmp_path / "eye" / "artifacts", {}, {})
    (tmp_path / "eye" / "config.yaml").write_text("{}")
    stage = build_stage(cfg)
    assert stage.kept == [] and stage.frozen == ["first_stage", "vision"]
    assert stage.model.vision.tower.embeddings.patch_embedding.weight.equal(
        vision.tower.embeddings.patch_embedding.weight
    )
    folder = tmp_path / "run"
    save_parts(stage.model, PARTS, folder / "artifacts", {"run": "run"}, {})
    OmegaConf.save(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), folder / "config.yaml", True)
    model, _ = restore(folder)
    assert model.vision is None and model.alignment is None
    trained, restored = stage.model.denoiser.state_dict(), model.denoiser.state_dict()
    assert restored.keys() == trained.keys() and all(value.equal(trained[name]) for name, value in restored.items())


def test_a_run_may_go_on_with_another_encoder(tmp_path):
    earlier, model = aligned_model(), aligned_model()
    torch.nn.init.ones_(next(model.vision.parameters()))  # type: ignore[union-attr]
    against = describe_frozen(earlier, [*PARTS, "first_stage"])
    save_parts(earlier, PARTS, tmp_path / "artifacts", {}, against)
    assert describe(model.vision)["content_hash"] != against["vision"]["content_hash"]  # type: ignore[arg-type]
    assert fill_parts(model, [tmp_path]).keys() == set(PARTS)


def random_encoder() -> Any:
    stage = aligned_stage()
    stage.kept = ["vision"]
    return stage


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: aligned_stage(trainable=PARTS[:2]), "must name alignment, and not vision"),
        (lambda: aligned_stage(trainable=[*PARTS, "vision"]), "must name alignment, and not vision"),
        (lambda: aligned_stage(alignment_weight=0), "'alignment_weight' must be above 0"),
        (lambda: random_encoder().on_filled({}), r"has random weights: name the run .* or set model\.vision\.source"),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ConfigError, match=says) as error:
        make()
    assert "\n" not in str(error.value)
