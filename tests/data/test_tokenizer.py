import json

import pytest
from transformers import AutoTokenizer

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.bad_samples import BadSamples
from mmlab.data.shard_files import ShardWriter
from mmlab.data.tokenizer import SMALLEST, train_tokenizer


@pytest.fixture
def index(tmp_path):
    with ShardWriter(tmp_path / "set", quiet=True) as writer:
        for i in range(20):
            question = {"question": "what color is the circle?", "answer": "red", "type": "color"}
            sure = {"question": "is it red?", "answer": "yes", "type": "yesno"}
            writer.write(f"s{i}", {"json": {"caption": "a red circle", "questions": [question, sure]}})
    return writer.index


def test_the_folder_is_a_llama_like_tokenizer(index, tmp_path):
    train_tokenizer([index], tmp_path / "tok", 320, ["###Human:"], quiet=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    ids = tokenizer("what color? 漢 zürich\n").input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "what color? 漢 zürich\n"
    decoded = tokenizer.decode(tokenizer("a red circle\nUSER: what color is the circle?").input_ids[1:])
    assert decoded == "a red circle\nUSER: what color is the circle?"
    words = [tokenizer.decode(i) for i in tokenizer("what color is the circle? ASSISTANT: red</s>").input_ids]
    assert words == ["<s>", "what", " color", " is", " the", " circle", "?", " ASSISTANT", ":", " red", "</s>"]
    assert len(tokenizer.tokenize(" yes")) == 1, "an answer stands behind a space"
    assert tokenizer.tokenize("###Human")[-1] == "Human"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer("x</s>", add_special_tokens=False).input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 2048
    assert len(tokenizer("what color is the circle?").input_ids) < 10
    spans = tokenizer("a red circle", return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    assert spans[0][0] == 0 and spans[-1][1] == 12


def test_the_same_texts_give_the_same_tokenizer(index, tmp_path):
    for name in "ab":
        train_tokenizer([index], tmp_path / name, 300, quiet=True)
    first, second = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in "ab")
    assert first == second


def test_records_that_cannot_be_read_are_left_out(index, tmp_path):
    with ShardWriter(tmp_path / "other", quiet=True) as writer:
        writer.write("a", {"json": {"caption": "a red circle"}})
        writer.write("b", {"json": rb'{"caption": "\ud83d"}'})
    bad = [BadSamples("a", 20), BadSamples("b", 2)]
    train_tokenizer([index, writer.index], tmp_path / "tok", 320, quiet=True, bad=bad)
    assert [list(one.errors) for one in bad] == [[], ["b"]] and bad[1].reasons == {"unicode": 1}


def test_classes_stand_in_for_texts(tmp_path):
    with ShardWriter(tmp_path / "set", quiet=True) as writer:
        for i in range(4):
            writer.write(f"s{i}", {"cls": "red_circle"})
    tokenizer = train_tokenizer([writer.index], tmp_path / "tok", 320, quiet=True)
    assert len(tokenizer.tokenize("red circle")) == 2


def test_errors(index, tmp_path):
    with pytest.raises(ConfigError, match=f"at least {SMALLEST}"):
        train_tokenizer([index], tmp_path / "tok", 100)
    with ShardWriter(tmp_path / "mute", quiet=True) as writer:
        writer.write("s", {"json": {"id": "1"}})
    with pytest.raises(DataError, match="neither texts nor classes"):
        train_tokenizer([writer.index], tmp_path / "tok", quiet=True)
