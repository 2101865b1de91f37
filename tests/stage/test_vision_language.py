"""MiniGPT-4's stages: the linear layer learns from what they show, and nothing else moves."""

from typing import Any

import pytest
import torch

from mmlab.config.errors import ConfigError
from mmlab.data.batch import IGNORE
from mmlab.data.config import Prompt
from mmlab.data.dialogues import DETAILED_DESCRIPTION
from mmlab.model.connector import Newline
from mmlab.stage.config import EndToEndFinetuningConfig, ProjectorAlignmentConfig, QFormerAlignmentConfig
from mmlab.stage.vision_language import QFormerAlignment
from tests.model import tiny
from tests.stage.tiny_stage import QUESTIONS, data_of, first_batch, fit, make_stage
from tests.tiny_files import png
from tests.tiny_shapes import make_records, make_shapes

FIRST = Prompt("plain", captions="blip", requests="minigpt4")
SECOND = Prompt("minigpt4", turns="caption", requests="minigpt4")
PARTS = ["vision", "qformer", "connector", "language"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"))


def build(root, prompt: Prompt = FIRST, **options: Any) -> QFormerAlignment:
    config = QFormerAlignmentConfig(**{"trainable": ["connector"], "prompt": prompt, **options})
    return make_stage(config, tiny.minigpt4(root / "tokenizer"))


@pytest.mark.parametrize("prompt", [FIRST, SECOND], ids=["stage 1", "stage 2"])
def test_the_linear_layer_alone_learns(root, prompt):
    stage = build(root, prompt)
    with torch.no_grad():  # a language model that says something else when it sees something else
        for parameter in stage.model.language.parameters():
            parameter.mul_(5)
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    watch = fit(stage, data_of(stage, [root / "train"], max_length=200), 25)
    assert sum(watch.losses[-4:]) < 0.97 * sum(watch.losses[:4]), watch.losses
    moved = {name for name, value in stage.model.state_dict().items() if not torch.equal(before[name], value)}
    assert moved == {"connector.proj.weight", "connector.proj.bias"}
    assert watch.modes == {part: {part == "connector"} for part in PARTS}
    optimizer: Any = stage.optimizers()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in stage.model.connector.parameters()} and len(held) == 2


def test_a_moved_q_former_is_noticed(root):
    """The test above can fail: one weight of the Q-Former that learns."""
    stage = build(root)
    stage.model.qformer.query_tokens.requires_grad_(True)
    before = stage.model.qformer.query_tokens.detach().clone()
    fit(stage, data_of(stage, [root / "train"]), 2)
    assert not torch.equal(before, stage.model.qformer.query_tokens)


def texts(stage: QFormerAlignment, batch: Any) -> list[tuple[str, str]]:
    """What each row holds, and what of it is learned."""
    decode = stage.model.language.tokenizer.decode
    rows = zip(batch["input_ids"], batch["labels"], batch["segment_ids"], strict=True)
    return [(decode(ids[segments > 0]), decode(labels[labels != IGNORE])) for ids, labels, segments in rows]


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    root = tmp_path_factory.mktemp("captions") / "train"
    make_records(root, [{"caption": "A RED Circle."}, {"caption": f"Blue {'very ' * 60}big."}], [png(), png()])
    return root


def test_the_first_stage_asks_nothing_and_learns_short_lower_case(root, captions):
    stage = build(root)
    shown = sorted(texts(stage, first_batch(stage, data_of(stage, [captions], 2, 2, max_length=400))), key=len)
    pads = "<pad>" * 5
    short = (f"<s>{pads}a red circle\n", "a red circle\n")
    long = f"blue {'very ' * 49}".strip() + "\n"
    assert set(shown) == {short, (f"<s>{pads}{long}", long)}


def test_the_second_stage_asks_and_learns_the_answer_alone(root, captions):
    stage = build(root, SECOND)
    pads = "<pad>" * 5
    for whole, learned in texts(stage, first_batch(stage, data_of(stage, [captions], 2, 2, max_length=400))):
        assert learned.startswith((" A RED", " Blue")) and learned.endswith(".###")
        opened = [f"<s>###Human: <Img>{pads}</Img> {question} ###Assistant: " for question in DETAILED_DESCRIPTION]
        assert whole.removesuffix(learned) in opened


@pytest.mark.parametrize(
    "trainable",
    [["connector", "qformer"], ["qformer"], ["connector", "language.causal.lm_head"], ["connector", "vision"]],
)
def test_more_than_the_linear_layer_is_refused(root, trainable):
    with pytest.raises(ConfigError, match=r"trainable must be \[connector\]"):
        build(root, trainable=trainable)


def test_stage_1_trains_the_connector_and_perhaps_a_newline(root):
    """LLaVA-NeXT's newline may stay frozen, as squares have no use for it."""
    model = tiny.vlm(root / "tokenizer")
    model.newline = Newline(model.language.width)
    for trainable in (["connector"], ["connector", "newline"]):
        assert make_stage(ProjectorAlignmentConfig(trainable=trainable, prompt=FIRST), model).model is model
    for trainable in (["newline"], ["connector", "language"]):
        with pytest.raises(ConfigError, match=r"must be \[connector\], or \[connector, newline\] with data\.aspect"):
            make_stage(ProjectorAlignmentConfig(trainable=trainable, prompt=FIRST), model)


def test_a_model_without_a_q_former_is_refused(root):
    with pytest.raises(ConfigError, match="use model=minigpt4, or stage=align"):
        make_stage(QFormerAlignmentConfig(trainable=["connector"], prompt=FIRST), tiny.vlm(root / "tokenizer"))


def test_the_feature_cache_holds_what_the_queries_read(root):
    cached, plain = build(root, feature_cache_mb=8), build(root)
    losses = [fit(stage, data_of(stage, [root / "train"]), 4).losses for stage in (cached, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert {tuple(entry.shape) for entry in cached.cache.entries.values()} == {(5, 24)}


def test_a_q_former_that_learns_is_not_cached(root):
    """MiniGPT-4's ablation; features from a cache would give it no gradient."""
    model = tiny.minigpt4(root / "tokenizer")
    config = EndToEndFinetuningConfig(trainable=["qformer", "connector"], prompt=QUESTIONS, feature_cache_mb=8)
    stage = make_stage(config, model)
    before = model.qformer.query_tokens.detach().clone()
    fit(stage, data_of(stage, [root / "train"]), 2)
    assert not stage.cache.entries and not torch.equal(before, model.qformer.query_tokens)
