"""Estimates of tiny recipes: against a real step, and what each setting changes."""

from functools import cache

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed._tools.mem_tracker import MemTracker

from mmlab.config.build import build
from mmlab.config.compose import compose
from mmlab.config.errors import ConfigError
from mmlab.stage.assembly import build_around
from mmlab.stage.estimate import Estimate, estimate
from mmlab.stage.largest_batch import largest_batch

CPU = ("trainer.accelerator=cpu", "trainer.precision=32-true")
DIT = ("experiment=diffusion/ddpm_tiny", "model/denoiser=dit_tiny", *CPU, "callbacks.ema=null")
CHAT = (
    "experiment=llava/finetune_tiny",
    "model/vision=siglip_tiny",
    "stage.feature_cache_mb=0",
    "data.global_batch=8",
    "data.micro_batch=2",
    *CPU,
)
CHAT = (*CHAT, "model.language.tokenizer=nowhere/at_all")
LARGE = "++model.language.architecture.hidden_size=512"


@cache
def estimated(*overrides: str) -> Estimate:
    return estimate(compose("train", list(overrides)))


@pytest.mark.parametrize("recompute", ["true", "false"])
def test_a_real_step_has_the_estimated_peak(recompute):
    overrides = (*DIT, f"trainer.gradient_checkpointing={recompute}", "data.micro_batch=8", "data.global_batch=8")
    cfg, found = compose("train", list(overrides)), estimated(*overrides)
    stage = build_around(build(cfg.model), cfg)
    optimizer = stage.optim.build(stage.model, 1)["optimizer"]
    batch = largest_batch(stage, OmegaConf.to_object(cfg.data))
    assert batch is not None
    stage.training_step(batch, 0).backward()
    optimizer.step()
    tracker = MemTracker()
    tracker.track_external(stage.model, optimizer, *(v for v in batch.values() if isinstance(v, torch.Tensor)))
    with tracker:
        loss = stage.training_step(batch, 0)
        optimizer.zero_grad()  # as late as Lightning does it
        loss.backward()
    real = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert found.passes == pytest.approx(real, rel=0.05)


def test_checkpointing_saves_activations_and_computes_the_same():
    plain, saved = estimated(*CHAT), estimated(*CHAT, "trainer.gradient_checkpointing=true")
    assert saved.activations and plain.activations and saved.activations < 0.9 * plain.activations
    assert (saved.flops, saved.weights, saved.optimizer) == (plain.flops, plain.weights, plain.optimizer)
    assert plain.micro_batches == 4 and plain.tokens == 8 * 256 and plain.supervised == 8 * (256 - 64)


def test_gradients_that_accumulate_are_there_at_the_peak():
    one, four = estimated(*CHAT, "data.global_batch=2"), estimated(*CHAT)
    assert four.gradients_at_peak == four.gradients and one.gradients_at_peak <= one.gradients
    assert four.flops == 4 * one.flops


def test_two_devices_have_buckets_and_half_of_the_micro_batches():
    one, two = estimated(*CHAT), estimated(*CHAT, "trainer.devices=2")
    assert two.buckets == two.gradients and one.buckets == 0
    assert (two.micro_batches, two.flops) == (2, one.flops)


def test_a_sharded_tower_that_learns_is_computed_again_in_the_same_dtypes():
    """CUDA's autocast, which is imitated here, reads the bf16 weights of its norms as fp32."""
    mixed = ("trainer.accelerator=gpu", "trainer.precision=bf16-mixed", "trainer.gradient_checkpointing=true")
    learns = "stage.trainable=[vision, connector, language]"
    assert estimated(*CHAT, *mixed, learns, "trainer.strategy=fsdp", "trainer.devices=2").flops > 0


def test_fsdp_shards_what_is_trained():
    one, four = (estimated(*CHAT, "trainer.strategy=fsdp", f"trainer.devices={n}") for n in (1, 4))
    vision = estimated(*CHAT).counts["vision"]["frozen"] * 4
    assert four.weights - vision == pytest.approx((one.weights - vision) / 4, rel=0.02)
    assert four.optimizer == pytest.approx(one.optimizer / 4, rel=0.02)
    assert four.checkpoint == pytest.approx(one.checkpoint / 4, rel=0.02)
    assert not torch.distributed.is_initialized()


def test_held_gradients_are_whole_on_each_device():
    fsdp = ("trainer.strategy=fsdp", "trainer.devices=2", LARGE)
    each, held = estimated(*CHAT, *fsdp), estimated(*CHAT, *fsdp, "trainer.fsdp.hold_reduction=true")
    assert held.passes - each.passes > 0.5 * each.gradients


def test_adapters_and_4_bits():
    whole = estimated(*CHAT, LARGE)
    adapted = estimated(*CHAT, LARGE, "+stage.lora.language.rank=8")
    packed = estimated(*CHAT, LARGE, "+stage.lora.language.rank=8", "model.language.quantize=nf4")
    assert adapted.optimizer < 0.2 * whole.optimizer and adapted.weights > whole.weights
    assert packed.weights < 0.8 * adapted.weights and packed.counts == adapted.counts


def test_half_precision_halves_the_states():
    single, half = estimated(*CHAT), estimated(*CHAT, "trainer.precision=bf16-true")
    assert half.optimizer == pytest.approx(single.optimizer / 2, rel=0.01)
    assert half.weights == pytest.approx(single.weights / 2, rel=0.01)


def test_averages_and_caches_count():
    kept = estimated(*DIT[:-1])
    assert kept.average == kept.gradients
    three = estimated(*DIT[:-1], "callbacks=diffusion_posthoc")
    assert three.average == 3 * kept.average and three.checkpoint == kept.checkpoint + 2 * kept.average
    assert estimated(*CHAT, "stage.feature_cache_mb=64").cache == 64 * 2**20


@pytest.mark.parametrize(
    "recipe",
    [
        *("emoji/text", "emoji/features", "taming/vqgan_tiny", "taming/prior_tiny", "ldm/class_tiny"),
        *("minigpt4/qformer_tiny", "minigpt4/stage1_tiny", "llava/language_tiny", "llava/align_tiny"),
    ],
)
def test_every_stage_has_a_batch(recipe):
    found = estimated(f"experiment={recipe}", *CPU)
    assert found.activations and found.flops > 0 and found.passes > found.weights


def test_other_strategies_are_refused():
    with pytest.raises(ConfigError, match=r"'trainer.strategy' cannot be 'deepspeed'. Options: auto, ddp, fsdp"):
        estimated(*CHAT, "trainer.strategy=deepspeed")


def test_rows_too_short_for_an_image_are_refused():
    with pytest.raises(ConfigError, match=r"An image takes 64 tokens and a row data\.max_length=64; "):
        estimated(*CHAT, "data.max_length=64")


@pytest.mark.parametrize(("precision", "share"), [("16-true", 0.5), ("64-true", 2)])
def test_a_true_precision_is_that_of_all_weights(precision, share):
    usual, found = estimated(*CHAT), estimated(*CHAT, f"trainer.precision={precision}")
    assert found.weights == pytest.approx(share * usual.weights, rel=0.01)
    assert found.step == pytest.approx(share * usual.step, rel=0.1)
