"""A model that is sharded over two ranks is validated as in one process: the same texts, images and scores."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from mmlab.data.config import ImageTextDataConfig
from mmlab.data.index import ShardIndex
from mmlab.data.module import ShardDataModule
from mmlab.diffusion.config import DiffusionConfig, GuidanceConfig, SamplerConfig
from mmlab.diffusion.process import Diffusion
from mmlab.diffusion.samplers import Sampler
from mmlab.evaluate.callbacks import quality
from mmlab.evaluate.callbacks.quality import AnswerQuality, SampleQuality
from mmlab.evaluate.callbacks.sample_sheets import AnsweredSamples, Card, GeneratedSamples, ReconstructedSamples
from mmlab.evaluate.config import (
    AnsweredSamplesConfig,
    AnswerQualityConfig,
    GeneratedSamplesConfig,
    ReconstructedSamplesConfig,
    SampleQualityConfig,
)
from mmlab.model.alignment import Alignment
from mmlab.model.code_sampling import CodeSampler
from mmlab.model.conditioner import ClassCondition
from mmlab.model.config import (
    AlignmentConfig,
    ClassConditionConfig,
    CodeSamplerConfig,
    DiTConfig,
    NoiseUncertaintyConfig,
)
from mmlab.model.denoiser import DiffusionModel
from mmlab.model.dit import DiT
from mmlab.model.language import LanguageModel, LanguageOnly
from mmlab.model.uncertainty import NoiseUncertainty
from mmlab.stage.config import CodePriorConfig, EndToEndFinetuningConfig, LatentDiffusionConfig
from mmlab.training.config import EMAConfig, FSDPConfig
from mmlab.training.ema import EMA
from mmlab.training.sharding import ShardedStrategy
from tests.evaluate.tiny_scores import Quadrants
from tests.model import tiny
from tests.model.tiny_priors import prior_model
from tests.stage import tiny_adversarial
from tests.stage.tiny_codes import code_data, make_maps
from tests.stage.tiny_diffusion import NAMES, TinyFirstStage, image_data
from tests.stage.tiny_stage import QUESTIONS, make_stage
from tests.tiny_ranks import ranks, shard
from tests.tiny_shapes import make_shapes
from tests.tiny_shards import sources
from tests.tiny_trainer import trainer_for

Run = tuple[Any, ShardDataModule, list[Any]]
STEPS = 8


def answering(root: Path) -> Run:
    """With few images and a cache of their features: each rank finds others of them there."""
    config = EndToEndFinetuningConfig(trainable=["connector", "language"], prompt=QUESTIONS, feature_cache_mb=8)
    stage = make_stage(config, tiny.vlm(root / "tokenizer"))
    batches = {"global_batch": 4, "micro_batch": 1, "seed": 0, "max_length": 120, "aspect": "stretch"}
    data = ImageTextDataConfig(train=sources(root / "train"), val=sources(root / "val"), **batches)
    score = AnswerQualityConfig(questions=str(root / "val"), limit=7, batch_size=4, max_new_tokens=3)
    sheet = AnsweredSamples(AnsweredSamplesConfig(count=3, max_new_tokens=4))
    return stage, ShardDataModule(data, stage.collate(data)), [sheet, AnswerQuality(score)]


def denoising(root: Path) -> Run:
    """With a first stage whose latents are measured when training starts, learned weights of the noise levels, and an
    alignment that stops."""
    torch.manual_seed(0)
    classes = ClassCondition(ClassConditionConfig(classes=NAMES, width=32, dropout=0.5))
    denoiser = partial(DiT, DiTConfig(depth=2, width=32, heads=4, patch=2))
    vision, alignment = tiny.vision("dinov2", feature_layer=-1), partial(Alignment, AlignmentConfig(width=6))
    uncertainty = NoiseUncertainty(NoiseUncertaintyConfig())
    model = DiffusionModel(TinyFirstStage(measured=False), classes, denoiser, vision, alignment, uncertainty)
    sampler = Sampler(SamplerConfig(name="ddpm", steps=3, guidance=GuidanceConfig(2.0)))
    parts = ["denoiser", "conditioner", "alignment", "uncertainty"]
    config = LatentDiffusionConfig(trainable=parts, alignment_stop=STEPS // 2)
    stage = make_stage(config, model, process=Diffusion(DiffusionConfig()), sampler=sampler)
    return stage, image_data(stage, ShardIndex.open(root / "maps"), micro_batch=4), drawing(root)


def sampling_codes(root: Path) -> Run:
    sampler = CodeSampler(CodeSamplerConfig(guidance=2.0, top_k=5))
    stage = make_stage(CodePriorConfig(trainable=["prior", "conditioner"]), prior_model("map"), sampler=sampler)
    return stage, code_data(stage, ShardIndex.open(root / "maps"), micro_batch=4), drawing(root)


def drawing(root: Path) -> list[Any]:
    score = SampleQualityConfig(features="quadrants", pictures=str(root / "maps"), aspect="crop", samples=6)
    score.batch_size = 4
    return [GeneratedSamples(GeneratedSamplesConfig(count=3, steps=3)), SampleQuality(score)]


def reconstructing(root: Path) -> Run:
    """Its latents are measured when training has ended. The discriminator waits: its share depends on micro-batches."""
    stage = tiny_adversarial.stage("kl", adversarial_start=2 * STEPS)
    data = tiny_adversarial.data_of(stage, root, micro_batch=4)
    return stage, data, [ReconstructedSamples(ReconstructedSamplesConfig(count=3))]


RUNS: dict[str, Callable[[Path], Run]] = {
    "answering": answering,
    "denoising": denoising,
    "sampling_codes": sampling_codes,
    "reconstructing": reconstructing,
}


def validated(name: str, root: Path, devices: int) -> dict[str, Any]:
    """Train for a few steps; returns metrics, what the sheets show, and buffers such as measured statistics."""
    torch.manual_seed(0)
    stage, data, callbacks = RUNS[name](root)
    sheet, shown = callbacks[0], []
    make_cards = sheet.make_cards
    sheet.make_cards = lambda *arguments: [shown.append(card) or card for card in make_cards(*arguments)]
    if devices == 1:
        data.config.micro_batch = data.config.global_batch
    trainer = trainer_for(
        data,
        STEPS,
        devices,
        strategy=ShardedStrategy(FSDPConfig(whole_below=0)) if devices > 1 else "auto",
        callbacks=[EMA(EMAConfig(decay=0.5)), *callbacks],
        default_root_dir=root / f"{name}-{devices}",
        val_every=STEPS // 2,
    )
    trainer.fit(stage, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"metrics": metrics, "shown": shown, "buffers": dict(stage.model.named_buffers())}


def continuing(root: Path, padded: bool, rank: int, sharded: bool) -> list[list[int]]:
    """Texts of one rank: the second one has more rows, of other lengths, and ends earlier.

    Args:
        root: has the tokenizer.
        padded: continue all rows together; otherwise those of a length.
        rank: which texts.
        sharded: whether the model is sharded.
    """
    torch.manual_seed(0)
    model = LanguageOnly(tiny.language(root / "tokenizer").eval())
    language: LanguageModel = model.language
    rows = [torch.arange(5, 5 + n) for n in ((4, 7, 7), (6, 3, 8, 2))[rank]]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    if sharded:
        shard(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmlab.model.language.pads_left", lambda config: padded)
        return language.generate(language.embed(ids), mask, max_new_tokens=(9, 2)[rank], do_sample=False).tolist()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = make_shapes(tmp_path_factory.mktemp("shapes"), train=8, val=6)
    make_maps(root, 8, "maps")
    return root


def two_ranks(rank: int, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    results: dict[str, Any] = {
        f"padded={padded}": continuing(folder, padded, rank, sharded=True) for padded in (True, False)
    }
    results |= {name: validated(name, folder, devices=2) for name in RUNS}
    torch.save(results, folder / f"results-{rank}.pt")


@pytest.fixture(scope="module")
def sharded(root) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "feature_network", lambda *_: Quadrants())
        ranks(2, two_ranks, root)
    return [torch.load(root / f"results-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("padded", [True, False])
def test_ranks_continue_different_rows_for_different_times(root, sharded, padded):
    for rank in (0, 1):
        assert sharded[rank][f"padded={padded}"] == continuing(root, padded, rank, sharded=False)


@pytest.mark.parametrize("name", RUNS)
def test_sheets_and_scores_are_those_of_one_process(root, sharded, name, monkeypatch):
    monkeypatch.setattr(quality, "feature_network", lambda *_: Quadrants())
    one = validated(name, root, devices=1)
    for two in (results[name] for results in sharded):
        assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-3)
        same(two["shown"], one["shown"])
        torch.testing.assert_close(two["buffers"], one["buffers"], rtol=1e-4, atol=1e-5)
    assert (root / f"{name}-2" / "samples" / f"step-{STEPS}.png").is_file()


def same(two: list[Card], one: list[Card]) -> None:
    assert len(one) == 6, "of two validations"
    assert [card.text for card in two] == [card.text for card in one]
    for here, there in zip(two, one, strict=True):
        assert here.picture is not None and there.picture is not None
        assert (here.picture.int() - there.picture.int()).abs().max() <= 1
