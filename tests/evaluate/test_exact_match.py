import pytest

from mmlab.evaluate.exact_match import matches, normalise, score
from mmlab.evaluate.questions import Question


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


def question(kind: str, answer: str) -> Question:
    return Question(0, "k", "?", answer, kind)


def test_scores_are_split_by_type():
    asked = [("color", "red"), ("count", "2"), ("color", "blue"), ("count", "3"), ("color", "black")]
    predictions = ["Red.", "2", "green", "4", "black"]
    assert score([question(*item) for item in asked], predictions) == {
        "accuracy": 3 / 5,
        "questions": 5,
        "types": {
            "color": {"accuracy": 2 / 3, "questions": 3},
            "count": {"accuracy": 1 / 2, "questions": 2},
        },
    }


def test_a_missing_prediction_is_noticed():
    with pytest.raises(ValueError):
        score([question("color", "red")] * 2, ["red"])
