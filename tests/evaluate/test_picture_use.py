"""Whether a run uses its pictures: what is asked, what is said, and that training does not change."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmlab.data.config import Prompt
from mmlab.evaluate.answers import Answerer
from mmlab.evaluate.callbacks import picture_use
from mmlab.evaluate.callbacks.picture_use import Asked, PictureUse, Replies, other_pictures
from mmlab.evaluate.config import PictureUseConfig
from mmlab.stage.config import ProjectorAlignmentConfig
from tests.evaluate.test_sample_sheets import Watch, stage_of, train
from tests.tiny_files import png
from tests.tiny_pictures import square
from tests.tiny_shapes import make_records, make_shapes


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes"), train=12, val=6)


def answering(monkeypatch, reply) -> list[str]:
    """Let `reply(mean of the pixels, n)` answer; returns the list of what is printed."""
    said: list[str] = []
    monkeypatch.setattr(picture_use, "tqdm", SimpleNamespace(write=said.append))
    monkeypatch.setattr(
        Answerer,
        "complete",
        lambda self, prompts, pictures: [
            (reply(pictures[n][0].tiles.float().mean().item(), n), True) for n in range(len(prompts))
        ],
    )
    return said


def callback(**settings: Any) -> PictureUse:
    return PictureUse(PictureUseConfig(**settings))


def test_it_asks_once_at_the_end_and_does_not_change_training(root, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(picture_use, "tqdm", SimpleNamespace(write=said.append))
    watched, plain = Watch(), Watch()
    stage = train(root, tmp_path, stage_of(root), watched, callback(questions=8, max_new_tokens=2))
    other = train(root, tmp_path, stage_of(root), plain)
    assert watched.seen == plain.seen
    weights = other.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in stage.state_dict().items())
    names = {name for name in stage.trainer.callback_metrics if name.startswith("val/picture/")}
    assert names == {f"val/picture/{name}" for name in ("accuracy", "blind", "other")}
    assert len(said) == 1 and said[0].startswith("The picture is not used: ") and "of 8 validation questions" in said[0]


def test_no_more_questions_at_a_time_than_training_has_rows(root, tmp_path, monkeypatch):
    sizes: list[int] = []
    said = answering(monkeypatch, lambda mean, n: sizes.append(n) or "yes")
    stage = train(root, tmp_path, stage_of(root), callback(questions=10), steps=1)
    assert max(sizes) + 1 == 4 == stage.trainer.datamodule.config.micro_batch
    assert len(said) == 1 and " of 10 " in said[0]


def test_a_question_without_room_for_its_answer_is_left_out(root, tmp_path, monkeypatch):
    said = answering(monkeypatch, lambda mean, n: "yes")
    train(root, tmp_path, stage_of(root), callback(max_new_tokens=110), steps=1)
    assert not said


ANSWER = {"from": "gpt", "value": "a"}


def test_a_question_before_the_first_picture_is_left_out(tmp_path, monkeypatch):
    talks = [["<image>\nWho?"], ["Hello", "<image>\nAnd?"], ["Which?"]]
    turns = [[turn for text in one for turn in ({"from": "human", "value": text}, ANSWER)] for one in talks]
    records = [{"conversations": one} for one in turns]
    index = make_records(tmp_path / "train", records, [png()] * 3)
    monkeypatch.setattr(picture_use, "spread", lambda data, count, read: [read(n, index, n) for n in range(count)])
    answerer: Any = SimpleNamespace(prompt=Prompt("v1"), tokens=lambda *_: [])
    answerer.decode = lambda files: [square(torch.zeros(3, 1, 1), 1) for _ in files]
    data: Any = SimpleNamespace(config=SimpleNamespace(max_length=99))
    asked = callback(questions=3).questions(data, answerer)
    assert [one.dialogue[0].text for one in asked] == ["<image>\nWho?", "<image>\nWhich?"]


def test_another_sample_s_pictures_are_shown_even_if_one_has_most_of_the_questions():
    one, two, three = ([name] for name in ("one", "two", "three"))
    shown = [one, one, one, one, two, three]
    other = other_pictures([Asked([], pictures, "") for pictures in shown])  # type: ignore[arg-type]
    assert other == [two, two, three, two, one, one]


def test_a_model_that_always_says_the_same_does_not_use_its_picture(root, tmp_path, monkeypatch):
    said = answering(monkeypatch, lambda mean, n: "yes")
    stage = train(root, tmp_path, stage_of(root), callback(), steps=1)
    scores = stage.trainer.callback_metrics
    assert said[0].startswith("The picture is not used")
    assert scores["val/picture/accuracy"] == scores["val/picture/blind"] == scores["val/picture/other"]


def test_captions_are_compared_by_what_another_picture_changes(root, tmp_path, monkeypatch):
    def captioner() -> Any:
        return stage_of(root, Prompt(template="plain"), ProjectorAlignmentConfig)

    said = answering(monkeypatch, lambda mean, n: "a photo of a t-shirt on a gray background")
    stage = train(root, tmp_path, captioner(), callback(), steps=1)
    assert (
        said[0].startswith("Replies hardly depend on the picture: 6 of 6 replies") and "1 distinct replies" in said[0]
    )
    assert stage.trainer.callback_metrics["val/picture/unchanged"] == 1
    said = answering(monkeypatch, lambda mean, n: f"a picture with a mean of {mean}")
    train(root, tmp_path, captioner(), callback(), steps=1)
    assert said[0].startswith("Replies depend on the picture: 0 of 6 replies")


@pytest.mark.parametrize(("own", "used"), [(1.0, True), (0.8, True), (0.5, False), (0.45, False)])
def test_a_gain_must_be_larger_than_chance(own, used):
    draw = random.Random(0)
    right = [draw.choice(["yes", "no"]) for _ in range(200)]
    wrong = {"yes": "no", "no": "yes"}

    def answers(accuracy: float) -> list[str]:
        return [answer if draw.random() < accuracy else wrong[answer] for answer in right]

    replies = Replies(right, answers(own), ["yes"] * 200, answers(0.5))
    assert replies.used == used, replies.sentence


@pytest.mark.parametrize(("wins", "used"), [(4, False), (5, True)])
def test_a_few_more_right_answers_are_chance(wins, used):
    """Four of four that differ are as likely as four heads of four coins, 1 in 16."""
    wrong = ["no"] * wins + ["yes"] * (8 - wins)
    assert Replies(["yes"] * 8, ["yes"] * 8, wrong, wrong).used == used


def test_a_model_that_is_lost_without_pictures_need_not_use_them(root):
    """Blank pictures can be unlike any in training; those of other samples are not."""
    right = ["yes", "no"] * 20
    replies = Replies(right, ["yes"] * 40, ["?"] * 40, ["yes"] * 40)
    assert not replies.used and "50.0% of 40" in replies.sentence and "0.0% with a blank" in replies.sentence
