"""Descriptions of a model that has memorized a few, and of an untrained one."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageColor

from mmlab.config.errors import DataError
from mmlab.data.config import ImageTextDataConfig, Prompt
from mmlab.data.dialogues import DETAILED_DESCRIPTION
from mmlab.data.sample_types import ImageSpec
from mmlab.data.turns import Turn
from mmlab.evaluate.answers import Answerer, AnswerFile
from mmlab.evaluate.descriptions import (
    Description,
    caption_questions,
    describe,
    description_notes,
    description_scores,
    description_sheet,
    judge,
    write_descriptions,
)
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.questions import Question
from mmlab.evaluate.scores.caption_scores import captions
from mmlab.evaluate.scores.constant_reply import with_baselines
from mmlab.evaluate.scores.score_table import Reference
from mmlab.report.contact_sheet import BAD, GOOD
from mmlab.stage.config import EndToEndFinetuningConfig
from tests.model import tiny
from tests.stage.tiny_stage import data_of, fit, make_stage
from tests.tiny_files import png
from tests.tiny_shapes import make_records

STRETCH = ImageTextDataConfig(aspect="stretch")

ASKED = Prompt("minigpt4", turns="caption", requests="minigpt4")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("described") / "train"
    make_records(root, [{"caption": "A Red Star."}] * 4, [png()] * 4)
    return root


def pictures(shards, **options: Any) -> PictureSet:
    return PictureSet(shards, ImageSpec(16, "stretch"), **options)


def learned(tokenizer, shards, prompt: Prompt):
    """A model that has learned only the caption."""
    config = EndToEndFinetuningConfig(trainable=["connector", "language"], prompt=ASKED)
    stage = make_stage(config, tiny.minigpt4(tokenizer))
    config.prompt = prompt
    fit(stage, data_of(stage, [shards], 4, 4, max_length=200), 80)
    return stage.model.eval()


@pytest.mark.parametrize(
    ("prompt", "text", "questions"),
    [
        (ASKED, "A Red Star.", set(DETAILED_DESCRIPTION)),
        (Prompt("plain", captions="blip"), "a red star", {""}),
    ],
)
def test_finished_descriptions_are_coherent(tokenizer_folder, shards, prompt, text, questions):
    answerer = Answerer(learned(tokenizer_folder, shards, prompt), prompt, STRETCH, max_new_tokens=30)
    said = describe(answerer, pictures(shards), 3)
    assert [one.text for one in said] == [text] * 4 and all(one.ended for one in said)
    assert {one.question for one in said} <= questions and [one.key for one in said] == [
        "s0000",
        "s0001",
        "s0002",
        "s0003",
    ]
    found = judge(said)
    assert description_scores(said, found) == {
        "descriptions": 4,
        "incoherent": 0,
        "repeated": 0,
        "fragment": 0,
        "no_end": 0,
        "words": 3,
        "sentences": prompt is ASKED,
        "exact": 1,
        "replies": {"distinct": 1, "commonest": text, "commonest_share": 1},
    }


def test_a_description_that_is_cut_off_has_no_end(tokenizer_folder, shards):
    answerer = Answerer(learned(tokenizer_folder, shards, ASKED), ASKED, STRETCH, max_new_tokens=4)
    said = describe(answerer, pictures(shards, limit=2), 2)
    assert [one.ended for one in said] == [False, False]
    assert all("no_end" in wrong and "fragment" in wrong for wrong in judge(said))


def test_the_request_depends_on_the_image(tokenizer_folder, shards):
    answerer = Answerer(tiny.minigpt4(tokenizer_folder), ASKED, STRETCH, max_new_tokens=2)
    asked = [[one.question for one in describe(answerer, pictures(shards), size)] for size in (1, 4)]
    assert asked[0] == asked[1] and len(set(asked[0])) > 1


def made(text: str, caption: str | None = "A dog runs.") -> Description:
    return Description(0, "k", "q", text, True, caption, bool(caption) and str(caption).endswith("."))


def test_descriptions_need_a_full_stop_if_captions_have_one():
    assert judge([made("a dog"), made("A dog runs.")]) == [["fragment"], []]
    assert judge([made("a dog", "a cat"), made("a dog runs", None)]) == [[], []]
    assert judge([made("a dog", None)]) == [[]]
    assert "exact" not in description_scores([made("a dog", None)], [[]])


def test_files_and_sheet(shards, tmp_path):
    said = [made("a dog a dog a dog"), Description(1, "k1", "q", "A dog runs.", True, "A dog runs.", True)]
    found = judge(said)
    scores = description_scores(said, found)
    write_descriptions(tmp_path / "new", said, found)
    rows = [json.loads(line) for line in (tmp_path / "new" / "descriptions.jsonl").read_text().splitlines()]
    assert [row["faults"] for row in rows] == [["repeated", "fragment"], []] and rows[1]["key"] == "k1"
    sheet = np.asarray(description_sheet(pictures(shards), said, found, scores))
    for color in (GOOD, BAD):
        assert (sheet == ImageColor.getrgb(color)).all(-1).any()


class Numbers:
    """Describes each image by its number, and is killed after some batches."""

    prompt = ASKED

    def __init__(self, batches: int, first: int = 0):
        self.batches, self.number = batches, first

    def decode(self, files):
        return files

    def replies(self, dialogues, pictures):
        if self.batches == 0:
            raise KeyboardInterrupt
        self.batches -= 1
        self.number += len(dialogues)
        return [(f"number {n}", n % 2 == 0) for n in range(self.number - len(dialogues), self.number)]


def test_saved_descriptions_are_not_computed_again(shards, tmp_path):
    def kept() -> AnswerFile:
        return AnswerFile(tmp_path / "unfinished.jsonl", {})

    straight = describe(Numbers(2), pictures(shards, limit=3), 2)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        describe(Numbers(1), pictures(shards, limit=3), 2, kept())  # type: ignore[arg-type]
    assert describe(Numbers(1, first=2), pictures(shards, limit=3), 2, kept()) == straight  # type: ignore[arg-type]
    assert describe(Numbers(0), pictures(shards, limit=3), 2, kept()) == straight  # type: ignore[arg-type]


def test_all_captions_of_an_image_are_right(tmp_path):
    make_records(tmp_path / "told", [{"captions": ["A dog.", " ", "A pet."]}, {"caption": "A cat."}], [png()] * 2)
    assert caption_questions(pictures(tmp_path / "told")) == {
        0: Question(0, "s0000", "", "A dog.", "caption", ("A dog.", "A pet.")),
        1: Question(1, "s0001", "", "A cat.", "caption", ("A cat.",)),
    }
    make_records(tmp_path / "untold", [{"id": "1"}], [png()])
    with pytest.raises(DataError, match=r"has no captions that can be used: .* 's0000': It has no caption to compare"):
        caption_questions(pictures(tmp_path / "untold"))


def test_images_that_cannot_be_used_are_left_out(tmp_path, tokenizer_folder):
    records = [{"caption": "A dog."}, {"caption": "A cat."}, {"id": "1"}, {"caption": "A cow."}]
    index = make_records(tmp_path / "some", records, [png(), png()[:40], png(), None])
    some = pictures(index.root)
    assert list(caption_questions(some)) == [0, 1, 3]
    answerer = Answerer(tiny.minigpt4(tokenizer_folder), ASKED, STRETCH, max_new_tokens=2)
    replies = describe(answerer, some, 2, AnswerFile(tmp_path / "saved", {}))
    assert [(reply.place, reply.key) for reply in replies] == [(0, "s0000"), (2, "s0002")]
    assert some.bad.reasons == {"no-caption": 1, "decode": 1, "no-picture": 1}
    again = pictures(index.root)
    assert describe(answerer, again, 2, AnswerFile(tmp_path / "saved", {})) == replies


@torch.no_grad()
def test_the_end_of_text_token_finishes_a_description(tokenizer_folder):
    """A model in a template other than it learned may end with its own token."""
    model = tiny.minigpt4(tokenizer_folder)
    answerer = Answerer(model, ASKED, STRETCH)
    tokenizer = model.language.tokenizer
    for said, ended in (("a star</s><pad>", True), ("a star###", True), ("a star", False)):
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        model.generate = lambda *args, ids=ids, **options: torch.tensor([ids])  # type: ignore[method-assign]
        assert answerer.replies([[Turn("human", "what?")]], [[]]) == [("a star", ended)]


def test_descriptions_that_stay_the_same_without_the_image_are_told(shards):
    """A request is drawn for each image, so that replies to it may differ although no image is used."""
    said = describe(Numbers(2), pictures(shards), 2, blind=Numbers(2))  # type: ignore[arg-type]
    assert [one.blind for one in said] == [one.text for one in said] and len({one.text for one in said}) == 4
    scores = description_scores(said, [[]] * 4)
    assert scores["unchanged"] == 1
    assert description_notes(scores)[-1] == "100.0% of the descriptions stay the same without the image"
    sheet = np.asarray(description_sheet(pictures(shards), said, [[]] * 4, scores))
    assert not (sheet == ImageColor.getrgb(GOOD)).all(-1).any()
    said = describe(Numbers(2), pictures(shards), 2, blind=Numbers(2, first=2))  # type: ignore[arg-type]
    assert description_scores(said, [[]] * 4)["unchanged"] == 0
    sheet = np.asarray(description_sheet(pictures(shards), said, [[]] * 4, description_scores(said, [[]] * 4)))
    assert (sheet == ImageColor.getrgb(GOOD)).all(-1).any()
    found = with_baselines(captions, ["a", "b"], [Reference(t, (t,)) for t in "ab"], blind={0: "a", 1: "a"})
    notes = description_notes({"descriptions": 2, **found})
    assert notes[0].startswith("without the images CIDEr-D is ") and "the best constant caption" in notes[1]


def test_one_description_for_all_images_is_seen_on_the_sheet(shards):
    said = [Description(n, f"k{n}", "q", "A dog runs.", True, "A dog runs.", True) for n in range(4)]
    scores = description_scores(said, judge(said))
    assert scores["incoherent"] == 0 and scores["replies"]["commonest_share"] == 1
    sheet = np.asarray(description_sheet(pictures(shards), said, judge(said), scores))
    assert (sheet == ImageColor.getrgb(BAD)).all(-1).any() and not (sheet == ImageColor.getrgb(GOOD)).all(-1).any()
