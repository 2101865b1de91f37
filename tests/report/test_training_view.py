from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from mmlab.data.collate import ChatCollate, PairCollate
from mmlab.data.config import ImageTextDataConfig, Prompt
from mmlab.data.image_condition import Conditioning
from mmlab.data.sample_types import ImageSpec, Picture, Sample
from mmlab.report.training_view import CUT, IMAGE, PROMPT, SUPERVISED, Piece, shape_of, view_of, view_sheet
from tests.tiny_pictures import square
from tests.tiny_tokenizers import llama_2

TURNS = [
    {"from": "human", "value": "<image>\nwhat is it?"},
    {"from": "gpt", "value": "a cat"},
    {"from": "human", "value": "is it black?"},
    {"from": "gpt", "value": "no"},
]
SPEC = ImageSpec(8, tokens=4)
PIXELS = torch.zeros(3, 8, 8, dtype=torch.uint8)


@pytest.fixture(scope="module")
def tokenizer():
    return llama_2()


def chat(tokenizer, length: int, **prompt) -> ChatCollate:
    data = ImageTextDataConfig(root="x", global_batch=1, micro_batch=1, max_length=length)
    return ChatCollate(data, Prompt(**prompt), tokenizer, SPEC)


def view(collate, record, image: torch.Tensor | None = PIXELS, **members):
    return view_of(collate, Sample("k", "s", record, [] if image is None else [square(image, 4)], 0, members))


def text(pieces: list[Piece], state: str) -> list[str]:
    return [piece.text for piece in pieces if piece.state == state]


def test_prompt_image_and_answers(tokenizer):
    shown = view(chat(tokenizer, 500), {"conversations": TURNS})
    (pieces,) = shown.texts
    assert [piece.strip() for piece in text(pieces, SUPERVISED)] == ["a cat</s>", "no</s>"]
    assert text(pieces, IMAGE) == ["<image: 4 tokens>"] and not text(pieces, CUT)
    assert "what is it?" in "".join(text(pieces, PROMPT)) and "is it black?" in "".join(text(pieces, PROMPT))
    assert shown.error is None and shown.counts["tokens_with_loss"] > 0


def test_several_pictures_and_tiles(tokenizer):
    pictures = [
        square(PIXELS, 4),
        Picture(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.arange(14), 2),
        Picture(torch.full((3, 3, 8, 8), 255, dtype=torch.uint8), torch.arange(6), 1),
    ]
    said = [{"from": "human", "value": "is <image> like <image> or <image>?"}, {"from": "gpt", "value": "a cat"}]
    views = [
        view_of(chat(tokenizer, length), Sample("k", "s", {"conversations": said}, pictures, 0)) for length in (500, 30)
    ]
    assert text(views[0].texts[0], IMAGE) == [f"<image: {n} tokens>" for n in (4, 14, 6)]
    assert views[0].counts["pictures"] == 3 and {piece.state for piece in views[1].texts[0]} == {CUT}
    assert [shape_of(picture) for picture in pictures] == [
        *("8 × 8", "1 + 2 × 2 tiles of 8 × 8, 14 tokens", "1 + 2 × 1 tiles of 8 × 8, 6 tokens")
    ]
    heights = [view_sheet([replace(views[0], pictures=pictures[:n])], "title").height for n in range(4)]
    assert heights[0] + 200 < heights[1] < heights[2], "two are below each other"
    assert heights[3] < heights[2], "more are beside each other"


def test_what_does_not_fit_is_cut_off(tokenizer):
    whole = view(chat(tokenizer, 500), {"conversations": TURNS}).counts["tokens"]
    collate = chat(tokenizer, whole - 1)
    shown = view(collate, {"conversations": TURNS})
    (pieces,) = shown.texts
    assert "is it black?" in "".join(text(pieces, CUT)) and "no" in "".join(text(pieces, CUT))
    assert [piece.strip() for piece in text(pieces, SUPERVISED)] == ["a cat</s>"]
    assert shown.counts["turns_dropped"] == 1
    shown = view(chat(tokenizer, 10), {"conversations": TURNS})
    assert {piece.state for piece in shown.texts[0]} == {CUT}
    assert "training would replace this sample (too-long)" in str(shown.error)


def test_each_question_and_other_prompts(tokenizer):
    record = {"caption": "a cat", "questions": [{"question": f"q{n}", "answer": f"a{n}"} for n in range(3)]}
    shown = view(chat(tokenizer, 500), record)
    assert [text(pieces, SUPERVISED)[0].strip() for pieces in shown.texts] == ["a0</s>", "a1</s>", "a2</s>"]
    (pieces,) = view(chat(tokenizer, 500, supervise="all"), {"conversations": TURNS}).texts
    assert "what is it?" in "".join(text(pieces, SUPERVISED))
    (pieces,) = view(chat(tokenizer, 500, template="plain", pictures="scattered"), record, None).texts
    assert text(pieces, IMAGE) == ["<scattered caption: 64 tokens>"]
    assert "no-caption" in str(view(chat(tokenizer, 500), {}).error)


def test_captions_and_classes(tokenizer):
    tokenizer = deepcopy(tokenizer)  # truncation stays switched on
    data = ImageTextDataConfig(root="x", global_batch=1, micro_batch=1, max_length=6)
    (pieces,) = view(PairCollate(data, tokenizer, SPEC), {"caption": "a cat and a dog and a bird"}).texts
    assert "".join(piece.text for piece in pieces).endswith("a cat and a dog and a bird")
    assert text(pieces, CUT) == [" dog and a bird"]
    (pieces,) = view(PairCollate(data, tokenizer, SPEC, class_prompt="a {}"), {"class": "red_dog"}).texts
    assert "".join(piece.text for piece in pieces).endswith("a red dog")
    missing = view(PairCollate(data, tokenizer, SPEC), {"class": "dog"})
    assert missing.texts == [] and "no-caption" in str(missing.error)

    class Images:
        conditioning = Conditioning(["cat", "dog"], tokenizer, 6)

        def prepare(self, sample):
            from mmlab.data.image_collate import conditioned

            return conditioned(sample, {}, self.conditioning)

    shown = view(Images(), {"class": "dog", "caption": "a"})
    assert shown.texts[0] == [Piece("class: dog", PROMPT)] and shown.counts["pictures"] == 1
    assert "no-class" in str(view(Images(), {"caption": "a"}).error)
    assert view(Images(), {"caption": "a"}, cls=b"cat\n").texts[0] == [Piece("class: cat", PROMPT)]


def test_the_sheet_grows_with_its_texts(tokenizer):
    few = view(chat(tokenizer, 500), {"conversations": TURNS})
    more = [TURNS[2], {"from": "gpt", "value": "word " * 300}]
    many = view(chat(tokenizer, 2000), {"conversations": TURNS + more})
    sheets = [view_sheet([one], "title") for one in (few, many)]
    assert sheets[0].width == sheets[1].width and sheets[0].height < sheets[1].height
    assert view_sheet([few, many], "title").height > sheets[1].height
    assert view_sheet([view(chat(tokenizer, 500), {"conversations": TURNS[2:]}, None)], "t").height < sheets[0].height
    colors = {color for _, color in sheets[0].getcolors(100_000)}
    assert {(0xC8, 0xE6, 0xC9), (0xCF, 0xE3, 0xFB)} <= colors
