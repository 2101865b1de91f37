"""A class in words, and as the caption of a sample that has none."""

import pytest
import torch
from transformers import AutoTokenizer

from mmlab.config.errors import ConfigError
from mmlab.data.class_texts import check_prompt, class_name, class_text
from mmlab.data.collate import PairCollate
from mmlab.data.config import ImageTextDataConfig
from mmlab.data.sample_types import ImageSpec, Sample, SampleError
from mmlab.stage.config import ContrastivePretrainingConfig
from tests.tiny_pictures import square


def test_a_class_in_words():
    assert class_text("a photo of a {}.", "red__apple ") == "a photo of a red apple."
    assert class_name({"class": 3}, {}) == "3" and class_name({}, {"cls": b"7\n"}) == "7" and class_name({}, {}) is None
    assert class_name({"class": 0}, {"cls": b"7"}) == "0" and class_name({"class": ""}, {}) is None


def test_a_prompt_without_a_place_is_refused():
    for check in (
        lambda: check_prompt("a photo", "stage.class_prompt"),
        lambda: ContrastivePretrainingConfig(trainable=["vision"], class_prompt="a photo"),
    ):
        with pytest.raises(ConfigError, match=r"stage.class_prompt='a photo' has no \{\} where the class belongs"):
            check()


def test_a_class_is_the_caption_of_a_sample_without_one(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = ImageTextDataConfig(max_length=64, aspect="pad", global_batch=1, micro_batch=1)

    def caption(prompt, record, **members):
        collate = PairCollate(config, tokenizer, ImageSpec(4), class_prompt=prompt)
        read = {name: members[name] for name in collate.members if name in members}
        sample = Sample("a", "s", record, [square(torch.zeros(3, 4, 4, dtype=torch.uint8))], 0, read)
        return tokenizer.decode(collate.prepare(sample).content[1], skip_special_tokens=True)

    assert caption("a {}.", {"class": "red_cat"}) == "a red cat."
    assert caption("a {}.", {}, cls=b"dog") == "a dog."
    assert caption("a {}.", {"class": "cat", "caption": "mine"}) == "mine"
    with pytest.raises(SampleError, match=r"no caption; \"stage.class_prompt='a photo of a \{\}.'\" makes one"):
        caption(None, {"class": "cat"})
    with pytest.raises(SampleError, match=r"The record has no caption\.$"):
        caption("a {}.", {})
