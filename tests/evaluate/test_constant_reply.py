"""A model that says the same to everything is told from one that looks at its images, whatever its score is."""

import pytest

from mmlab.evaluate.scores.caption_scores import captions
from mmlab.evaluate.scores.constant_reply import beside, variety, variety_line, with_baselines
from mmlab.evaluate.scores.score_table import Reference, table
from mmlab.evaluate.scores.scorers import exact, facts
from mmlab.evaluate.scores.vqa import vqa
from mmlab.evaluate.scores.yes_no import mme, pope

THINGS = ["t-shirt", "shoe", "bag", "coat"]


def refer(answers: list[str], kind: str = "kind") -> list[Reference]:
    return [Reference(f"q{n}", (answer,), (kind,), f"p{n}") for n, answer in enumerate(answers)]


def test_a_captioner_that_always_says_the_same_equals_the_baseline():
    references = refer([f"A photo of a {THINGS[n % 4]}." for n in range(12)])
    replies = ["a photo of a T-shirt"] * 11 + ["A photo of a t-shirt."]
    scores = captions(replies, references)
    found = with_baselines(captions, replies, references)
    assert found["replies"] == {"distinct": 1, "commonest": "a photo of a T-shirt", "commonest_share": 1}
    assert scores.all["bleu_4"] > 0.5 and found["constant"]["cider_d"] >= scores.all["cider_d"] > 0  # type: ignore[operator]
    assert found["constant"]["types"]["kind"].keys() == scores.types["kind"].keys()
    good = captions([r.answers[0] for r in references], references)
    assert good.all["cider_d"] > found["constant"]["cider_d"]
    summary = {**scores.as_json(), **found}
    head, *_, last = table(summary, scores.main).splitlines()
    assert head.split()[-1] == "constant" and float(last.split()[-1]) == pytest.approx(scores.all["cider_d"], abs=1e-3)
    line = "1 distinct reply to 12 questions; 100.0% are 'a photo of a T-shirt'"
    assert variety_line(found["replies"], 12) == line and beside("cider_d", summary).endswith(line)


@pytest.mark.parametrize(
    ("scorer", "answers", "reply", "value"),
    [
        (exact, ["red", "blue", "Red.", "green"], "red", 0.5),
        (vqa, ["yes", "no", "no"], "no", 2 / 3),
        (pope, ["yes", "no"] * 5, "yes", 0.5),
    ],
)
def test_the_best_constant_answer(scorer, answers, reply, value):
    found = with_baselines(scorer, ["?"] * len(answers), refer(answers))["constant"]
    assert (found["reply"], found["accuracy"]) == (reply, pytest.approx(value))


def test_two_questions_about_an_image_stay_together():
    references = [Reference(f"{n}{a}", (a,), ("color",), f"p{n}") for n in range(700) for a in ("yes", "no")]
    found = with_baselines(mme, ["Yes"] * 1400, references)["constant"]
    assert found["types"]["color"]["accuracy"] == 0.5


def test_a_reply_may_state_several_facts():
    references = [Reference(f"q{n}", ("red", "two"), (), f"p{n}") for n in range(3)]
    assert with_baselines(facts, [""] * 3, references)["constant"]["facts"] == 1


def test_the_reply_is_from_the_training_set_if_there_is_one():
    found = with_baselines(exact, ["x", "y"], refer(["red", "red"]), refer(["blue", "blue", "red"]))["constant"]
    assert found["reply"] == "red"
    assert with_baselines(exact, ["x", "y"], refer(["red", "red"]), refer(["blue"]))["constant"]["accuracy"] == 0


def test_missing_replies_are_no_replies():
    assert variety([None, "a", None, "A."]) == {"distinct": 1, "commonest": "a", "commonest_share": 0.5}
    assert variety([None]) == {"distinct": 0, "commonest": "", "commonest_share": 0}
