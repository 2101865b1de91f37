import pytest

from mmlab.evaluate.scores.score import Reference
from mmlab.evaluate.scores.scorers import exact, matches, normalise


@pytest.mark.parametrize(
    ("said", "answer", "right"),
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
def test_matches(said, answer, right):
    assert matches(said, answer) == right


def test_normalise():
    assert normalise(" A  red\ncircle. ") == "a red circle"


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
