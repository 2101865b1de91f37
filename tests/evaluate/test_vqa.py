"""VQAv2's normalization and soft accuracy, compared with values computed by hand."""

import pytest

from mmlab.evaluate.scores.score_table import Reference
from mmlab.evaluate.scores.vqa import normalized, soft_accuracy, vqa


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("Yes", "yes"),
        ("  yes. ", "yes"),
        ("a red bus", "red bus"),
        ("The Man", "man"),
        ("an", ""),
        ("two", "2"),
        ("ten dogs", "10 dogs"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("don't", "don't"),
        ("man's", "man's"),
        ("12:30", "12:30"),
        ("1.5", "1.5"),
        ("5.", "5"),
        ("p.m.", "pm"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),  # a comma between digits, and every mark goes without a trace
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("black-white - grey", "blackwhite grey"),  # beside a space once, without a trace everywhere
        ("yes\nno", "yes no"),
        ("what?!", "what"),
        ("(left)", "left"),
    ],
)
def test_normalized(answer, form):
    assert normalized(answer) == form


@pytest.mark.parametrize(("same", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_ten_people(same, accuracy):
    answers = ["red"] * same + [f"other {n}" for n in range(10 - same)]
    assert soft_accuracy("Red.", answers) == pytest.approx(accuracy)
    brute = [min(1, sum(other == "red" for m, other in enumerate(answers) if m != n) / 3) for n in range(10)]
    assert soft_accuracy("Red.", answers) == pytest.approx(sum(brute) / 10)


def test_people_s_answers_are_normalized_too():
    assert soft_accuracy("t shirt", ["a T-shirt"] * 10) == 1
    assert soft_accuracy("2", ["two"] * 5 + ["2"] * 5) == 1


def test_one_answer_is_exact_match():
    assert soft_accuracy("a bus", ["bus"]) == 1 and soft_accuracy("car", ["bus"]) == 0


def test_rows_per_type_and_missing_predictions():
    ten = ("yes",) * 10
    references = [Reference("1", ten, ("yes/no", "is the")), Reference("2", ten, ("yes/no",)), Reference("3", ten)]
    scores = vqa(["yes", None, "no"], references)
    assert scores.each == [1, 0, 0] and scores.all == {"accuracy": pytest.approx(1 / 3), "questions": 3}
    assert scores.types == {
        "is the": {"accuracy": 1, "questions": 1},
        "yes/no": {"accuracy": 0.5, "questions": 2},
        "(none)": {"accuracy": 0, "questions": 1},
    }
