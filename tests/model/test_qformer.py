"""The Q-Former against transformers' BLIP-2, its checkpoints, and who sees whom in it."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Blip2Config, Blip2ForConditionalGeneration, LlamaConfig

from mmlab.config.errors import ConfigError
from mmlab.model.config import QFormerConfig, VisionEncoderConfig
from mmlab.model.qformer import QFormer, visible
from mmlab.model.vision import VisionEncoder
from tests.model import tiny
from tests.tiny_pictures import placed

QUERIES = 5
PIXELS = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def blip2(language: dict[str, Any], vision: dict[str, Any], qformer: dict[str, Any]) -> Any:
    """transformers' BLIP-2 with a Llama, whose last token stands for a picture's place."""
    vocabulary = language["vocab_size"]
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=LlamaConfig(**{**language, "vocab_size": vocabulary + 1}).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=vocabulary,
    )
    torch.manual_seed(1)
    return Blip2ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def ours(tokenizer_folder):
    return tiny.minigpt4(tokenizer_folder)


@pytest.fixture(scope="module")
def theirs(ours):
    """BLIP-2 of the same sizes with weights of its own; its queries, which transformers leaves at zero, are drawn."""
    configs = (part.config.to_dict() for part in (ours.language, ours.vision, ours.qformer))
    model = blip2(*configs)
    torch.nn.init.normal_(model.query_tokens)
    torch.nn.init.normal_(model.vision_model.post_layernorm.weight)
    return model


@pytest.fixture(scope="module")
def checkpoint(theirs, tmp_path_factory):
    """The same in several files, as published checkpoints are."""
    folder = tmp_path_factory.mktemp("blip2")
    theirs.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.mark.parametrize("at", [1, 3])
def test_logits_equal_transformers_blip2(tokenizer_folder, theirs, checkpoint, at):
    """Loaded from its checkpoint; the queries stand at any place of the prompt."""
    ours = tiny.minigpt4(tokenizer_folder)
    eye = VisionEncoderConfig(source=str(checkpoint), feature_layer=-1, features="cls_patch")
    ours.vision = tiny.pretrained(VisionEncoder(eye))
    ours.qformer = tiny.pretrained(QFormer(QFormerConfig(source=str(checkpoint), queries=QUERIES), 32, text=False))
    ours.connector.proj.load_state_dict(theirs.language_projection.state_dict())
    vocabulary = ours.language.config.vocab_size
    weights = {name: tensor.clone() for name, tensor in theirs.language_model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:vocabulary]
    ours.language.causal.load_state_dict(weights)

    text = torch.tensor([[1, 7, 8, 9, 10, 11], [1, 12, 13, 14, 15, 16]])
    places = torch.full((2, QUERIES), vocabulary)
    ids = torch.cat([text[:, :at], places, text[:, at:]], 1)
    row = {
        "input_ids": ids.masked_fill(ids == vocabulary, 0),
        **placed([(0, at), (1, at)], QUERIES),
        "segment_ids": torch.ones_like(ids),
        "context_ids": torch.zeros_like(ids),
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
        "packed": True,
    }
    everywhere = torch.ones_like(ids).bool()
    with torch.no_grad():
        normalised = (PIXELS - ours.vision.mean) / ours.vision.std
        expected = theirs(input_ids=ids, pixel_values=normalised).logits[..., :vocabulary].flatten(0, 1)
        actual = ours(row, ours.features(PIXELS), everywhere)
        assert torch.allclose(actual, expected, atol=1e-5)
        other = ours(row, ours.features(255 - PIXELS), everywhere)
        assert not torch.allclose(other, expected, atol=1e-3), "the picture is seen"


def test_a_loaded_q_former_reads_as_transformers_does(theirs, checkpoint):
    qformer = tiny.pretrained(QFormer(QFormerConfig(source=str(checkpoint), queries=QUERIES), 32, text=False))
    features = torch.randn(2, 5, 32)
    with torch.no_grad():
        read = theirs.vision_model.post_layernorm(features)
        queries = theirs.query_tokens.expand(2, -1, -1)
        expected = theirs.qformer(query_embeds=queries, encoder_hidden_states=read).last_hidden_state
        assert torch.allclose(qformer(features), expected, atol=1e-6)


def test_only_the_files_that_hold_the_part_are_opened(checkpoint, tmp_path):
    names = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {
        file for name, file in names.items() if name.startswith(("query_tokens", "qformer.", "vision_model.post"))
    }
    assert needed < set(names.values())
    for file in ("config.json", "model.safetensors.index.json", *needed):
        (tmp_path / file).write_bytes((checkpoint / file).read_bytes())
    assert tiny.pretrained(QFormer(QFormerConfig(source=str(tmp_path), queries=QUERIES), 32, text=False)).width == 24


def test_the_saved_folder_is_a_source_and_fills_another(tmp_path):
    torch.manual_seed(2)
    qformer = tiny.qformer().eval()
    qformer.save(tmp_path)
    features = torch.randn(1, 4, 32)
    again = tiny.pretrained(QFormer(QFormerConfig(source=str(tmp_path), queries=QUERIES), 32, text=False))
    other = tiny.qformer().eval()
    assert not torch.equal(other(features), qformer(features))
    other.load(tmp_path)
    assert torch.equal(again(features), qformer(features)) and torch.equal(other(features), qformer(features))


def test_the_text_half_stays_behind(tmp_path):
    torch.manual_seed(3)
    pretrained = tiny.qformer(text=True).eval()
    pretrained.save(tmp_path)
    alone = tiny.qformer().eval()
    alone.load(tmp_path)
    features = torch.randn(1, 4, 32)
    assert torch.equal(alone(features), pretrained(features))
    names = set(load_file(tmp_path / "model.safetensors"))
    assert len(names) > len(alone.state_dict())
    alone.save(tmp_path)
    with pytest.raises(ConfigError, match=r"does not fit the model: qformer\.encoder\.layer\.0\.intermediate"):
        pretrained.load(tmp_path)


@pytest.mark.parametrize(
    ("width", "options", "says"),
    [
        (16, {"queries": QUERIES}, "reads features of width 32, but model.vision gives 16"),
        (32, {"queries": 7}, "has 5 queries, but model.qformer.queries=7"),
        (32, {"init": "random", "architecture": {"hiden_size": 8}}, "Did you mean 'hidden_size'"),
    ],
)
def test_what_does_not_fit_is_refused(checkpoint, width, options, says):
    with pytest.raises(ConfigError, match=says):
        tiny.pretrained(QFormer(QFormerConfig(source=str(checkpoint), **options), width, text=False))


def test_sources_without_a_q_former_are_refused(tmp_path):
    tiny.vision("clip").save(tmp_path)
    with pytest.raises(ConfigError, match="is a clip_vision_model; a BLIP-2 checkpoint has a Q-Former"):
        QFormer(QFormerConfig(source=str(tmp_path)), 32, text=False)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        QFormer(QFormerConfig(source=str(tmp_path / "nowhere")), 32, text=False)


def reads(task: str, changed: int) -> list[int]:
    """The places (5 queries, then 4 tokens, the last of them padding) that notice a change at one place."""
    torch.manual_seed(4)
    qformer = tiny.qformer(text=True).eval()
    features, embeds = torch.randn(1, 3, 32), torch.randn(1, 4, 24)
    seen = visible(task, torch.tensor([[1, 1, 1, 0]]), QUERIES)
    with torch.no_grad():
        before = torch.cat(qformer.with_text(features, embeds, seen), 1)
        if changed < QUERIES:
            qformer.query_tokens[0, changed] += torch.randn(24)
        else:
            embeds[0, changed - QUERIES] += torch.randn(24)
        after = torch.cat(qformer.with_text(features, embeds, seen), 1)
    return [place for place in range(9) if not torch.allclose(before[0, place], after[0, place], atol=1e-5)]


@pytest.mark.parametrize(
    ("task", "query", "first", "second", "padding"),
    [
        ("contrast", [0, 1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 7, 8], [8]),
        ("caption", [*range(9)], [5, 6, 7, 8], [6, 7, 8], [8]),
        ("match", [*range(9)], [*range(9)], [*range(9)], [8]),
    ],
)
def test_who_notices_a_change(task, query, first, second, padding):
    """ITC: no text is seen from queries nor queries from text. ITG: causal, and the queries are seen. ITM: all."""
    assert reads(task, 2) == query
    assert (reads(task, 5), reads(task, 6), reads(task, 8)) == (first, second, padding)


def test_the_text_reads_the_picture_only_through_the_queries():
    torch.manual_seed(5)
    qformer = tiny.qformer(text=True).eval()
    embeds, mask = torch.randn(1, 4, 24), torch.ones(1, 4)
    pictures = torch.randn(2, 1, 3, 32)
    with torch.no_grad():
        for task, sees in (("contrast", False), ("caption", True), ("match", True)):
            first, second = (qformer.with_text(p, embeds, visible(task, mask, QUERIES))[1] for p in pictures)
            assert torch.allclose(first, second, atol=1e-6) != sees, task


def test_queries_read_the_same_with_and_without_a_text():
    torch.manual_seed(6)
    qformer = tiny.qformer(text=True).eval()
    features, embeds = torch.randn(2, 3, 32), torch.randn(2, 4, 24)
    with torch.no_grad():
        for task, same in (("contrast", True), ("caption", True), ("match", False)):
            queries, _ = qformer.with_text(features, embeds, visible(task, torch.ones(2, 4), QUERIES))
            assert torch.allclose(queries, qformer(features), atol=1e-6) == same, task


def test_weights_are_float32_whatever_a_config_names(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part in ("vision_config", "qformer_config"):
        config[part]["dtype"] = "float16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    for part in (
        VisionEncoder(VisionEncoderConfig(source=str(tmp_path), feature_layer=-1, features="cls_patch")),
        QFormer(QFormerConfig(source=str(tmp_path), queries=QUERIES), 32, text=False),
    ):
        part.load_pretrained()
        assert {weight.dtype for weight in part.parameters()} == {torch.float32}
