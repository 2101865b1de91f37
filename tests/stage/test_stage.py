"""Each stage trains what it should, on batches from real shards, and nothing else."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.data.config import Prompt
from mmlab.model.config import LanguageModelConfig
from mmlab.model.language import LanguageModel, LanguageOnly
from mmlab.stage.config import (
    ContrastivePretrainingConfig,
    EndToEndFinetuningConfig,
    LanguagePretrainingConfig,
    ProjectorAlignmentConfig,
)
from tests.model import tiny
from tests.stage.tiny_stage import CAPTIONS, QUESTIONS, TOWERS, data_of, dual_encoder, first_batch, fit, make_stage
from tests.tiny_files import png
from tests.tiny_shapes import make_records, make_shapes
from tests.tiny_shards import sources

UNUSED = {
    "vision": {"tower.post_layernorm.weight", "tower.post_layernorm.bias"},
    "text": {"tower.pooler.dense.weight", "tower.pooler.dense.bias"},
}
TEXT = Prompt("v1", pictures="text", supervise="all", system="", turns="every")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Dialogues without pictures."""
    root = tmp_path_factory.mktemp("records") / "texts"
    record = {"questions": [{"question": "what color is grass?", "answer": "green"}]}
    make_records(root, [record] * 8, [None] * 8)
    return root


def align(trainable: list[str], prompt: Prompt = QUESTIONS, **options) -> ProjectorAlignmentConfig:
    return ProjectorAlignmentConfig(trainable=trainable, prompt=prompt, **options)


def finetune(trainable: list[str], prompt: Prompt = QUESTIONS, **options) -> EndToEndFinetuningConfig:
    return EndToEndFinetuningConfig(trainable=trainable, prompt=prompt, **options)


def build(kind: str, root, **options) -> Any:
    tokenizer = root / "tokenizer"
    if kind == "align":
        return make_stage(align(["connector"], prompt=CAPTIONS, **options), tiny.vlm(tokenizer))
    if kind == "finetune":
        return make_stage(finetune(["connector", "language"], **options), tiny.vlm(tokenizer))
    if kind == "language":
        torch.manual_seed(0)
        config = LanguagePretrainingConfig(trainable=["language"], prompt=TEXT)
        return make_stage(config, LanguageOnly(tiny.language(tokenizer)))
    return make_stage(ContrastivePretrainingConfig(trainable=TOWERS), dual_encoder(tokenizer))


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "learns", "share", "options"),
    [
        ("align", {"connector"}, 0.97, {}),
        ("finetune", {"connector", "language"}, 0.8, {"pack": True, "max_length": 240}),
        ("language", {"language"}, 0.8, {"pack": True}),
        ("contrastive", set(TOWERS), 0.8, {"augment": True}),
    ],
)
def test_the_loss_falls_and_frozen_parts_stay(root, kind, learns, share, options):
    stage = build(kind, root)
    with torch.no_grad():  # a language model that says something else when it sees something else
        for parameter in stage.model.language.parameters() if kind == "align" else ():
            parameter.mul_(5)
    before = {part: weights(module) for part, module in stage.model.named_children()}
    watch = fit(stage, data_of(stage, [root / "train"], **options), 25)
    assert len(watch.losses) == 25
    assert sum(watch.losses[-4:]) < share * sum(watch.losses[:4]), watch.losses
    for part, module in stage.model.named_children():
        same = [torch.equal(before[part][name], value) for name, value in module.state_dict().items()]
        if part in learns:
            still = {name for name, value in module.named_parameters() if torch.equal(before[part][name], value)}
            assert still == {name for name, value in module.named_parameters() if not value.requires_grad}
            assert still == (UNUSED[part] if kind == "contrastive" and part in UNUSED else set())
            assert watch.modes[part] == ({True, False} if still else {True})
        else:
            assert all(same), f"{part} moved"
            assert watch.modes[part] == {False}, f"{part} was in train mode"
            assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    assert set(before) - learns == set(stage.frozen)


def test_a_moved_frozen_part_is_noticed(root):
    """The test above can fail: one weight of a frozen part that learns."""
    stage = build("align", root)
    before = weights(stage.model.vision)
    next(stage.model.vision.parameters()).requires_grad_(True)
    fit(stage, data_of(stage, [root / "train"]), 2)
    after = stage.model.vision.state_dict()
    assert not all(torch.equal(before[name], value) for name, value in after.items())


@pytest.mark.parametrize(
    ("config", "trainable", "says"),
    [
        (align, ["connector", "language"], r"trainable must be \[connector\]"),
        (align, ["language"], r"trainable must be \[connector\]"),
        (align, ["connector", "vision.tower"], r"trainable must be \[connector\]"),
        (align, ["connector", "language.causal.lm_head"], r"trainable must be \[connector\]"),
        (align, [], "is empty; name at least one of vision, connector, language"),
        (finetune, ["conector", "language"], "Did you mean 'connector'"),
    ],
)
def test_what_a_stage_does_not_train_is_refused(root, config, trainable, says):
    with pytest.raises(ConfigError, match=says):
        make_stage(config(trainable), tiny.vlm(root / "tokenizer"))


def test_what_a_stage_does_not_read_is_refused(root):
    model = tiny.vlm(root / "tokenizer")
    with pytest.raises(ConfigError, match="has no questions; use v1"):
        make_stage(finetune(["connector", "language"], Prompt("plain")), model)
    with pytest.raises(ConfigError, match="feature_cache_mb=0"):
        data_of(build("align", root, feature_cache_mb=8), [root / "train"], augment=True)
    with pytest.raises(ConfigError, match="whole images and captions"):
        data_of(build("contrastive", root), [root / "train"], pack=True)


def test_the_feature_cache_changes_no_loss(root):
    losses, seen = [], []
    for megabytes in (0, 8):
        stage = build("align", root, feature_cache_mb=megabytes)
        pictures = []
        stage.model.vision.register_forward_hook(lambda module, args, out, to=pictures: to.append(len(args[0])))
        losses.append(fit(stage, data_of(stage, [root / "train"]), 6).losses)
        seen.append(sum(pictures))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert seen == [48, 12], "each of the 12 pictures goes through the encoder once"


def test_the_feature_cache_tells_splits_apart_whose_folders_and_keys_are_alike(root, tmp_path):
    record = {"questions": [{"question": "what color?", "answer": "red"}]}
    for split, color in (("train", "red"), ("val", "blue")):
        make_records(tmp_path / split / "shards", [record] * 2, [png(color=color)] * 2)
    seen = []
    for megabytes in (0, 8):
        stage = build("finetune", root, feature_cache_mb=megabytes)
        data = data_of(stage, [tmp_path / "train" / "shards"])
        data.config.val = sources(tmp_path / "val" / "shards")
        fit(stage, data, 1)
        seen.append(float(stage.trainer.callback_metrics["val/loss"]))
    assert len(stage.cache.entries) == 4
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)


def test_the_feature_cache_is_off_where_the_encoder_learns(root):
    model = tiny.vlm(root / "tokenizer")
    everything = ["vision", "connector", "language"]
    stage = make_stage(finetune(everything, feature_cache_mb=8), model)
    losses = fit(stage, data_of(stage, [root / "train"]), 4).losses
    assert not stage.cache.entries and losses[-1] < losses[0]


@pytest.mark.parametrize("cache", [0, 8])
def test_batches_of_text_alone_train(root, texts, cache):
    stage = build("finetune", root, feature_cache_mb=cache)
    before = weights(stage.model.connector)
    data = data_of(stage, [texts], max_length=64)
    assert first_batch(stage, data)["pixel_values"].shape == (0, 3, 16, 16)
    losses = fit(stage, data, 6).losses
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[k], v) for k, v in stage.model.connector.state_dict().items())


def test_dropout_in_frozen_parts_is_off_and_in_others_on(root):
    fields = {**tiny.LANGUAGE["gpt2"], "resid_pdrop": 0.5, "n_embd": 24, "n_layer": 2, "n_head": 2}
    language = LanguageModel(LanguageModelConfig(init="random", architecture=fields, tokenizer=str(root / "tokenizer")))
    for trainable, same in ((["connector"], True), (["connector", "language"], False)):
        model = tiny.vlm(root / "tokenizer")
        model.language = language
        stage = make_stage(finetune(trainable), model).train()
        batch = first_batch(stage, data_of(stage, [root / "train"]))
        with torch.no_grad():
            assert torch.equal(stage.loss(batch)[0], stage.loss(batch)[0]) == same


def test_only_what_learns_is_in_a_checkpoint(root):
    stage = build("align", root)
    checkpoint = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(checkpoint)
    names = {f"model.connector.{name}" for name in stage.model.connector.state_dict()}
    assert set(checkpoint["state_dict"]) == names
    stage.load_state_dict(checkpoint["state_dict"], strict=stage.strict_loading)


def test_of_a_part_that_learns_in_part_only_that_is_in_a_checkpoint(root):
    stage = make_stage(finetune(["language.causal.lm_head"]), tiny.vlm(root / "tokenizer"))
    checkpoint = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == {"model.language.causal.lm_head.weight"}


def test_frozen_parts_sit_in_the_compute_dtype(root):
    stage = build("align", root)
    losses = fit(stage, data_of(stage, [root / "train"]), 3, precision="bf16-mixed").losses
    dtypes = {part: next(m.parameters()).dtype for part, m in stage.model.named_children()}
    half = torch.bfloat16
    assert dtypes == {"vision": half, "connector": torch.float32, "language": half}
    plain = build("align", root)
    expected = fit(plain, data_of(plain, [root / "train"]), 3).losses
    assert losses == pytest.approx(expected, rel=0.05)


def test_validation_is_one_mean_over_all_tokens(root):
    stage = build("finetune", root)
    data = data_of(stage, [root / "train"], micro_batch=2)
    data.config.val = sources(root / "val")
    fit(stage, data, 1)
    loader = data.val_dataloader()
    assert not isinstance(loader, list)
    with torch.no_grad():
        sums = [stage.eval().loss(stage.on_before_batch_transfer(batch, 0)) for batch in loader]
    assert len(sums) == 2
    expected = sum(float(loss) for loss, _ in sums) / sum(tokens for _, tokens in sums)
    assert float(stage.trainer.callback_metrics["val/loss"]) == pytest.approx(expected, rel=1e-5)


def step(stage, batch) -> float:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # there is no trainer to log to
        return float(stage.training_step(batch, 0))


def siglip(stage, batch, positive: list[tuple[int, int]]) -> float:
    """Algorithm 1 of the paper, pair by pair."""
    picture, text = stage.model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    scale, bias = stage.model.similarity.log_scale.exp(), stage.model.similarity.bias
    total = torch.zeros(())
    for i in range(len(picture)):
        for j in range(len(text)):
            logit = scale * torch.dot(picture[i], text[j]) + bias
            total = total - F.logsigmoid((1 if i == j or (i, j) in positive else -1) * logit)
    return float(total / len(picture))


def pairs(stage, captions: list[str]):
    tokens = stage.model.text.tokenizer(captions, padding=True, return_tensors="pt")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (len(captions), 3, 16, 16), dtype=torch.uint8, generator=generator)
    return {
        "pixel_values": pixels,
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
    }


def test_the_siglip_loss_equals_the_paper_s_pair_by_pair(root):
    stage = build("contrastive", root)
    with torch.no_grad():
        stage.model.similarity.bias.fill_(-1.0)  # at the published start nearly all terms vanish
        batch = pairs(stage, ["a red circle", "a blue star and a black square", "a square", "a star"])
        assert step(stage, batch) == pytest.approx(siglip(stage, batch, []), rel=1e-5)


def test_equal_captions_are_positives(root):
    stage = build("contrastive", root)
    with torch.no_grad():
        stage.model.similarity.bias.fill_(-1.0)
        batch = pairs(stage, ["a red circle", "a star", "a red circle", "a black square"])
        assert step(stage, batch) == pytest.approx(siglip(stage, batch, [(0, 2), (2, 0)]), rel=1e-5)
        assert step(stage, batch) != pytest.approx(siglip(stage, batch, []), rel=1e-3)


def test_scale_and_bias_start_as_published(root):
    similarity = build("contrastive", root).model.similarity
    assert float(similarity.log_scale.exp().detach()) == pytest.approx(10)
    assert float(similarity.bias.detach()) == -10
