"""Exact match, facts, and scorers by name."""

import pytest

from mmlab.evaluate.config import METRICS, SCORERS
from mmlab.evaluate.scores.score_table import Reference
from mmlab.evaluate.scores.scorers import exact, facts, matches, normalized, says, scorer_named


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_has_a_scorer(metric):
    scorer = scorer_named(metric)
    assert scorer.__module__ + "." + scorer.__name__ == SCORERS[metric]


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("Red", "red", True),
        ("  red \n", "red", True),
        ("red.", "red", True),
        ("The  RED\tcircle.", "the red circle", True),
        ("red", "red.", True),
        ("dark red", "red", False),
        ("red!", "red", False),
        ("", "red", False),
        ("3.5", "3.5", True),
        ("3.5", "35", False),
    ],
)
def test_matches(prediction, answer, right):
    assert matches(prediction, answer) == right


def test_normalized():
    assert normalized(" A  red\ncircle. ") == "a red circle"


def asked(kind: str, *answers: str) -> Reference:
    return Reference("k", answers, (kind,))


def test_scores_are_split_by_type():
    references = [asked("color", "red"), asked("count", "2"), asked("color", "blue"), asked("count", "3")]
    scores = exact(["Red.", "2", "green", "4", "black"], [*references, asked("color", "black")])
    assert scores.each == [1, 1, 0, 0, 1]
    assert scores.as_json() == {
        "accuracy": 3 / 5,
        "questions": 5,
        "types": {
            "color": {"accuracy": 2 / 3, "questions": 3},
            "count": {"accuracy": 1 / 2, "questions": 2},
        },
    }


def test_any_of_several_answers_is_right_and_none_is_wrong():
    assert exact(["crimson", "blue", None], [asked("color", "red", "Crimson")] * 3).each == [1, 0, 0]


def test_a_missing_prediction_is_noticed():
    with pytest.raises(ValueError):
        exact(["red"], [asked("color", "red")] * 2)


@pytest.mark.parametrize(
    ("text", "fact", "contained"),
    [
        ("It is a Red circle.", "red", True),
        ("It is a small red circle, at the top left.", "top left", True),
        ("It is at the top, left of the tree.", "left top", False),
        ("It is reddish.", "red", False),
        ("So: the answer is 4.", "The answer is 4", True),
        ("The answer is 40.", "The answer is 4", False),
        ("", "red", False),
    ],
)
def test_a_fact_is_contained_in_whole_words(text, fact, contained):
    assert says(text, fact) == contained


def test_facts():
    references = [Reference("a", ("small", "red"), ("detail",)), Reference("b", ("yes",), ("chat",))]
    references += [Reference("c", ("top", "left", "red", "large"), ("detail",)), Reference("d", ("no",), ("chat",))]
    scores = facts(["a small red star", "yes, it is", "a red one at the left", None], references)
    assert scores.each == [1, 1, 0.5, 0] and scores.main == "facts"
    assert scores.as_json() == {
        "facts": 2.5 / 4,
        "whole": 2 / 4,
        "questions": 4,
        "types": {
            "chat": {"facts": 0.5, "whole": 0.5, "questions": 2},
            "detail": {"facts": 0.75, "whole": 0.5, "questions": 2},
        },
    }
