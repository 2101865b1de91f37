"""A condition is embedded once and dropped once, and a dropped row is the unconditional one."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mmlab.config.errors import ConfigError
from mmlab.model.conditioner import ClassCondition, NoCondition, TextCondition
from mmlab.model.config import ClassConditionConfig, TextConditionConfig
from mmlab.training.trainable import set_trainable
from tests.model import tiny

SIZES = {
    "clip_text_model": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "t5": {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 2, "d_kv": 16},
}
TEXTS = ["red circle", "what color is the red circle?", ""]
DROP = torch.tensor([True, False, False])


def classes(classes: Any, width: int, **options: Any) -> ClassCondition:
    return ClassCondition(ClassConditionConfig(classes=classes, width=width, **options))


def text(tokenizer_folder, kind: str = "clip_text_model", **options) -> TextCondition:
    torch.manual_seed(0)
    architecture = {"model_type": kind, **SIZES[kind]}
    settings = {"init": "random", "tokenizer": str(tokenizer_folder), "max_length": 12, **options}
    return TextCondition(TextConditionConfig(architecture=architecture, **settings)).eval()


def conditioners(tokenizer_folder):
    """Each kind with what it reads of a batch of three."""
    labels = {"labels": torch.tensor([0, 2, 1])}
    yield NoCondition(), {}
    yield classes(3, 8), labels
    yield classes(["cat", "dog", "cow"], 8, as_context=True), labels
    for kind in SIZES:
        for hide in (False, True):
            conditioner = text(tokenizer_folder, kind, hide_padding=hide)
            yield conditioner, conditioner.tokenize(TEXTS)


@torch.no_grad()
def test_a_dropped_row_is_the_null_row(tokenizer_folder):
    for conditioner, given in conditioners(tokenizer_folder):
        whole, null = conditioner(given), conditioner.null(3, "cpu")
        dropped = conditioner(given, torch.ones(3, dtype=torch.bool))
        some = conditioner(given, DROP)
        assert whole.keys() == null.keys() == dropped.keys() == some.keys()
        for name in whole:
            assert whole[name].shape == null[name].shape
            assert torch.allclose(dropped[name].float(), null[name].float(), atol=1e-6)
            assert torch.allclose(some[name][:1].float(), null[name][:1].float(), atol=1e-6)
            assert torch.allclose(some[name][1:].float(), whole[name][1:].float(), atol=1e-6)
        if whole:
            name = "vector" if "vector" in whole else "context"
            assert (whole[name][0] - null[name][0]).abs().max() > 1e-3


def test_widths_are_those_of_the_tensors(tokenizer_folder):
    for conditioner, given in conditioners(tokenizer_folder):
        condition = conditioner(given)
        widths = {name: value.shape[-1] for name, value in condition.items() if name != "mask"}
        told = {"vector": conditioner.vector_width, "context": conditioner.context_width}
        assert widths == {name: width for name, width in told.items() if width is not None}


def test_a_class_is_embedded_once():
    """One table, read by one look-up; its gradient falls on the rows that were seen, the null row for dropped ones."""
    conditioner = classes(3, 4)
    assert [tuple(p.shape) for p in conditioner.parameters()] == [(4, 4)]
    conditioner({"labels": torch.tensor([0, 1, 1])}, DROP)["vector"].sum().backward()
    assert conditioner.embedding.weight.grad is not None
    assert conditioner.embedding.weight.grad[:, 0].tolist() == [0, 2, 0, 1]


def test_nothing_is_dropped_that_was_not_asked_for():
    """Dropping is the caller's decision: in training mode the module itself drops nothing, whatever its probability."""
    conditioner = classes(3, 4, dropout=1.0).train()
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(conditioner({"labels": labels})["vector"], conditioner.embedding.weight[:3])


def test_class_names():
    named = classes(["tench", "goldfish"], 4)
    assert (named.names, named.index("goldfish"), classes(12, 4).index(7)) == (["tench", "goldfish"], 1, 7)
    assert (named.index(0), named.index("1"), classes(["1", "0"], 4).index(1)) == (0, 1, 0), "names come first"
    with pytest.raises(ConfigError, match="There is no class '2'"):
        named.index(2)
    with pytest.raises(ConfigError, match=r"no class 'goldfisch'\. Did you mean 'goldfish'\? Classes: tench, goldfish"):
        named.index("goldfisch")
    with pytest.raises(ConfigError, match="'cat' twice"):
        classes(["cat", "dog", "cat"], 4)
    for wrong in ([], None, "cat", 2.5, True, 0):
        with pytest.raises(ConfigError, match="must be their number or the list"):
            classes(wrong, 4)


def test_embeddings_are_loaded_for_the_classes_that_they_were_trained_with(tmp_path):
    names = ["cat", "dog", "cow"]
    trained, many = classes(names, 8), classes(40, 8)
    trained.save(tmp_path / "a")
    many.save(tmp_path / "many")
    same = classes(names, 8)
    same.load(tmp_path / "a")
    assert torch.equal(same.embedding.weight, trained.embedding.weight) and trained.describe() == {"classes": names}
    with pytest.raises(ConfigError, match=r"other classes: set .*\.classes=\[cat,dog,cow\], in this order"):
        classes(["dog", "cat", "cow"], 8).load(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"set .*=\[cat,dog,cow\], in this order, not \[0,1,2\]"):
        classes(3, 8).load(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"it has 40 classes, and model\.conditioner\.classes 41"):
        classes(41, 8).load(tmp_path / "many")
    with pytest.raises(ConfigError, match=r"its class 1, counted from 0, is '1', and in .* '2'"):
        classes([0, 2, 1, *range(3, 40)], 8).load(tmp_path / "many")
    (tmp_path / "a" / "classes.json").unlink()
    with pytest.raises(ConfigError, match=r"does not hold the embeddings of classes: .*classes\.json"):
        classes(names, 8).load(tmp_path / "a")


@pytest.mark.parametrize("kind", SIZES)
@torch.no_grad()
def test_text_is_what_transformers_computes(tokenizer_folder, kind):
    conditioner = text(tokenizer_folder, kind)
    rows = conditioner.tokenize(TEXTS)
    assert rows["input_ids"].shape == (3, 12)
    expected = conditioner.encoder(input_ids=rows["input_ids"])[0]
    condition = conditioner(rows)
    assert torch.equal(condition["context"], expected) and "mask" not in condition
    hidden = text(tokenizer_folder, kind, hide_padding=True)(rows)
    assert torch.equal(hidden["mask"], rows["attention_mask"].bool())
    seen = hidden["mask"]
    assert torch.equal(hidden["context"][seen], conditioner.encoder(**rows)[0][seen])


@torch.no_grad()
def test_a_batch_padded_to_its_longest_text_is_the_same(tokenizer_folder):
    for kind in SIZES:
        conditioner = text(tokenizer_folder, kind)
        rows = conditioner.tokenize(TEXTS[:1])
        length = int(rows["attention_mask"].sum())
        short = {name: row[:, :length] for name, row in rows.items()}
        assert length < 12
        assert torch.equal(conditioner(short)["context"], conditioner(rows)["context"])


@pytest.mark.parametrize(
    ("kind", "config", "model"),
    [
        ("clip_text_model", CLIPTextConfig, CLIPTextModel),
        ("bert", BertConfig, BertModel),
        ("t5", T5Config, T5EncoderModel),
    ],
)
@torch.no_grad()
def test_reads_checkpoints_and_its_own_folders(tokenizer_folder, tmp_path, kind, config, model):
    torch.manual_seed(3)
    theirs = model(config(**SIZES[kind], vocab_size=293)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    settings = TextConditionConfig(source=str(tmp_path / "theirs"), tokenizer=str(tokenizer_folder), max_length=9)
    conditioner = tiny.pretrained(TextCondition(settings))
    rows = conditioner.tokenize(TEXTS)
    assert torch.equal(conditioner(rows)["context"], theirs(input_ids=rows["input_ids"])[0])
    conditioner.save(tmp_path / "ours")
    again = text(tokenizer_folder, kind, max_length=9)
    assert not torch.equal(again(rows)["context"], conditioner(rows)["context"])
    again.load(tmp_path / "ours")
    assert torch.equal(again(rows)["context"], conditioner(rows)["context"])
    opened = (
        AutoModel.from_pretrained(tmp_path / "ours")
        if kind != "t5"
        else T5EncoderModel.from_pretrained(tmp_path / "ours")
    )
    assert torch.equal(opened.eval()(input_ids=rows["input_ids"])[0], conditioner(rows)["context"])
    with pytest.raises(ConfigError, match="does not fit the model"):
        text(tokenizer_folder, "bert" if kind != "bert" else "t5").load(tmp_path / "ours")


def test_every_weight_of_a_text_encoder_is_used(tokenizer_folder):
    """Data parallelism refuses weights without a gradient: BERT's pooler is left out."""
    for kind in SIZES:
        conditioner = text(tokenizer_folder, kind)
        set_trainable(nn.ModuleDict({"conditioner": conditioner}), ["conditioner"])
        conditioner(conditioner.tokenize(TEXTS))["context"].sum().backward()
        assert [name for name, p in conditioner.named_parameters() if p.grad is None] == []


def test_mistakes_are_one_sentence(tokenizer_folder):
    with pytest.raises(ConfigError, match=r"^model\.conditioner\.tokenizer is not set"):
        TextCondition(TextConditionConfig(init="random", architecture={"model_type": "bert"}))
    with pytest.raises(ConfigError, match="'gpt2' is not a text encoder"):
        TextCondition(
            TextConditionConfig(init="random", architecture={"model_type": "gpt2"}, tokenizer=str(tokenizer_folder))
        )
    with pytest.raises(ConfigError, match="max_length=99, but the text encoder has 77 positions"):
        text(tokenizer_folder, max_length=99)
    with pytest.raises(ConfigError, match=r"13 tokens are longer than model\.conditioner\.max_length=12"):
        text(tokenizer_folder)({"input_ids": torch.ones(1, 13).long(), "attention_mask": torch.ones(1, 13).long()})
    with pytest.raises(ConfigError, match="293 tokens, the model only 90"):
        architecture = {"model_type": "bert", **SIZES["bert"], "vocab_size": 90}
        TextCondition(TextConditionConfig(init="random", architecture=architecture, tokenizer=str(tokenizer_folder)))


def test_a_text_with_a_token_that_the_encoder_lacks_is_refused(tokenizer_folder):
    architecture = {"model_type": "bert", **SIZES["bert"], "vocab_size": 292}
    config = TextConditionConfig(
        init="random", architecture=architecture, tokenizer=str(tokenizer_folder), max_length=8
    )
    conditioner = TextCondition(config)
    last = conditioner.tokenizer.convert_ids_to_tokens(292).replace("Ġ", " ")
    assert conditioner(conditioner.tokenize(["!"]))["context"].shape[1] == 8
    with pytest.raises(ConfigError, match=r"has 292 tokens, and '.+' is not one of them"):
        conditioner.tokenize([last])
