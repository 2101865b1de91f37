"""A tokenizer of sentencepiece alone gives sentencepiece's tokens, with the offsets that labels need."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig
from transformers.convert_slow_tokenizer import import_protobuf

from mmlab.config.errors import ConfigError
from mmlab.data.config import Prompt
from mmlab.data.conversation import chat_prompt, encode
from mmlab.data.turns import Turn
from mmlab.model.pretrained_tokenizer import load_tokenizer
from tests.tiny_tokenizers import sentencepiece_model

MODEL = sentencepiece_model()
TEXTS = [
    "What is in the picture?",
    "two  spaces,   three",
    " one before",
    "   three before",
    "after ",
    "  ",
    "\n\nlines\n of\r\ntext\t",
    "3.14159 × 猫 😀 é e\u0301",
    "▁ in the text▁",
    "\u00a0no break\u200b",
    "",
]


def folder(path: Path, **fields: Any) -> Path:
    """A folder with the files and keys of Vicuna's tokenizer."""
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {**token, "content": "<s>"},
        "clean_up_tokenization_spaces": False,
        "eos_token": {**token, "content": "</s>"},
        "model_max_length": 2048,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": {**token, "content": "<unk>"},
        **fields,
    }
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(MODEL)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    (path / "special_tokens_map.json").write_text(json.dumps(special))
    AutoConfig.for_model("llama").save_pretrained(path)
    return path


def pieces(prefix: bool = True) -> SentencePieceProcessor:
    """Sentencepiece itself, with or without a space before each text."""
    proto = import_protobuf().ModelProto.FromString(MODEL)
    proto.normalizer_spec.add_dummy_prefix = prefix
    return SentencePieceProcessor(model_proto=proto.SerializeToString())


def texts() -> list[str]:
    draw = random.Random(0)
    alphabet = ["a", "the", "T", " ", " ", "  ", "\n", "?", "7", "▁", "é", "猫", "USER:", "\t", "square"]
    return TEXTS + ["".join(draw.choices(alphabet, k=draw.randint(1, 12))) for _ in range(500)]


@pytest.mark.parametrize("fields", [{"legacy": False}, {"legacy": True}, {}], ids=str)
def test_tokens_are_sentencepiece_s(tmp_path, fields):
    tokenizer, reference = load_tokenizer(str(folder(tmp_path / "vicuna", **fields))), pieces()
    rest = reference if fields.get("legacy", True) else pieces(prefix=False)
    assert tokenizer.is_fast and len(tokenizer) == len(reference)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.model_max_length == 2048
    for text in texts():
        assert tokenizer(text)["input_ids"] == [1, *reference.encode(text)], text
        # Text after a special token has a space before it only in folders of before that was found to be wrong.
        whole = tokenizer(f"A dog.</s>{text}x</s>")["input_ids"]
        assert whole == [1, *reference.encode("A dog."), 2, *rest.encode(f"{text}x"), 2], text
        assert tokenizer.decode(reference.encode(f"{text}x")) == reference.decode(reference.encode(f"{text}x"))


def test_a_copy_in_a_run_gives_the_same_tokens(tmp_path):
    tokenizer = load_tokenizer(str(folder(tmp_path / "vicuna", chat_template="{{ messages[0]['content'] }}")))
    tokenizer.save_pretrained(tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text((tmp_path / "vicuna" / "config.json").read_text())
    copy = load_tokenizer(str(tmp_path / "copy"))
    assert all(copy(text)["input_ids"] == tokenizer(text)["input_ids"] for text in texts())
    assert copy.chat_template == tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert copy.special_tokens_map == tokenizer.special_tokens_map


def test_tokens_beside_the_model_are_added(tmp_path):
    path = folder(tmp_path / "vicuna_v0", legacy=True)
    (path / "added_tokens.json").write_text(json.dumps({"[PAD]": len(pieces())}))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.convert_tokens_to_ids("[PAD]") == len(pieces()) == len(tokenizer) - 1


@pytest.mark.parametrize("legacy", [False, True])
def test_labels_are_exactly_the_answers(tmp_path, legacy):
    tokenizer = load_tokenizer(str(folder(tmp_path / "vicuna", legacy=legacy)))
    dialogue = [Turn("human", "What is in the picture?"), Turn("gpt", "A  red\nsquare."), Turn("human", "And 猫?")]
    dialogue.append(Turn("gpt", "Two yellow triangles, é."))
    segment = encode(dialogue, Prompt("v1"), tokenizer)
    assert [tokenizer.decode(run) for run in _runs(segment.labels)] == [
        "A  red\nsquare.</s>",
        "Two yellow triangles, é.</s>",
    ]
    prompt = chat_prompt(dialogue[:3], Prompt("v1"), tokenizer).input_ids
    assert segment.input_ids[: len(prompt)] == prompt


def _runs(labels: list[int]) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for label in labels:
        if label >= 0:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def test_a_folder_without_tokenizer_names_the_setting(tmp_path):
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has no tokenizer \(tokenizer\.json, tokenizer\.model.*set model\.l"):
        load_tokenizer(str(tmp_path))


def test_a_damaged_model_is_one_sentence(tmp_path):
    path = folder(tmp_path / "vicuna")
    (path / "tokenizer.model").write_bytes(MODEL[:100])
    with pytest.raises(ConfigError, match=r"vicuna cannot be loaded: its tokenizer\.model is damaged, or not"):
        load_tokenizer(str(path))
