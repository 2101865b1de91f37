"""The blind baseline tells a model that looks at its pictures from one that does not."""

from dataclasses import replace

import pytest
import torch

from mmlab.data.config import ImageTextDataConfig, Prompt
from mmlab.data.images import decode_picture
from mmlab.data.sample_types import ImageSpec
from mmlab.evaluate.answer_report import answer_scores, predict
from mmlab.evaluate.answers import Answerer
from mmlab.evaluate.baselines import BlindAnswerer, answer_blind, blank, blind_places
from mmlab.evaluate.questions import read_pictures, read_questions
from mmlab.evaluate.scores.scorers import exact
from tests.model import tiny
from tests.tiny_files import png
from tests.tiny_shapes import make_records


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Three questions about each of six pictures, a dialogue among them, and one about none."""
    color = {"question": "color?", "answer": "seen", "type": "color"}
    follow_ups = [{"question": "sure?", "answer": "blank"}]
    count = {"question": "count?", "answer": "seen", "type": "count", "follow_ups": follow_ups}
    records = [{"questions": [color, count]}] * 7
    return make_records(tmp_path_factory.mktemp("blind") / "test", records, [*[png()] * 6, None])


@pytest.fixture
def answerer(tokenizer_folder, asked, monkeypatch):
    """Says whether its picture is blank."""

    def complete(self, prompts, pictures):
        asked.extend(prompts)
        return [("blank" if is_blank(picture) else "seen", True) for picture in pictures]

    monkeypatch.setattr(Answerer, "complete", complete)
    return Answerer(tiny.vlm(tokenizer_folder), Prompt("v1", system=""), ImageTextDataConfig(aspect="stretch"))


@pytest.fixture
def asked():
    """The prompts that reach the model."""
    return []


def is_blank(pictures) -> bool:
    return any(torch.equal(picture.tiles, blank(picture).tiles) for picture in pictures)


def test_a_blank_picture_has_the_shape_but_nothing_else(index):
    picture = decode_picture(read_pictures(index, 0)[0], ImageSpec(28, tokens=4))
    empty = blank(picture)
    assert empty.tiles.shape == (1, 3, 28, 28) and empty.tiles.dtype == torch.uint8 and empty.places is picture.places
    assert empty.tiles[0].flatten(1).unique(dim=1).tolist() == [[122], [116], [104]]


def test_equal_prompts_are_computed_once(index, answerer, asked):
    questions = read_questions(index)
    answers = answer_blind(answerer, index, questions, 4)
    assert answers == dict.fromkeys(range(18), "blank"), "questions without a picture are not asked"
    assert len(asked) == 3
    assert BlindAnswerer(answerer).spec is answerer.spec
    answerer.prompt = replace(answerer.prompt, pictures="none")
    assert answer_blind(answerer, index, questions, 4) == {}


def test_some_whole_samples_are_asked(index):
    questions = read_questions(index)
    assert blind_places(index, questions) == list(range(18))
    places = blind_places(index, questions, 4)
    samples = [questions[n].sample for n in places]
    assert len(places) == 6 and len(set(samples)) == 2 and sorted(samples) == samples
    assert places == blind_places(index, questions, 4)
    assert any(blind_places(index, questions, 4, seed) != places for seed in range(1, 5))


def test_scores_with_and_without_pictures(index, answerer):
    def scored(questions):
        replies, blind = predict(answerer, index, questions, 5), answer_blind(answerer, index, questions, 5)
        return answer_scores(exact, questions, replies, blind=blind)

    questions = read_questions(index)
    scores, summary = scored(questions[:18])
    assert scores.all["accuracy"] == pytest.approx(2 / 3)
    blind, types = summary["blind"], summary["blind"]["types"]
    assert (blind["accuracy"], blind["unchanged"]) == (pytest.approx(1 / 3), 0)
    assert (types["color"]["gain"], types["count"]["gain"]) == (1, 0)
    assert summary["replies"]["distinct"] == 1 and summary["constant"]["accuracy"] == pytest.approx(2 / 3)
    assert scored(questions[18:])[1].get("blind") is None
