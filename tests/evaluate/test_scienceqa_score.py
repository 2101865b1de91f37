"""The published rules, on typical replies of models."""

import pytest

from mmlab.config.errors import DataError
from mmlab.data.sources.scienceqa import COLUMNS, load_problems
from mmlab.evaluate.scores.scienceqa_score import differences, extract, reference_of, result_layout, scienceqa
from mmlab.evaluate.scores.score_table import Reference
from tests.tiny_problems import problem, write_problems

LONG = "A force is a push or a pull.\nThe answer is in the table below.\n"


@pytest.mark.parametrize(
    ("text", "choices", "index"),
    [
        # A bare letter.
        ("A", 2, 0),
        ("E", 5, 4),
        ("C", 2, -1),
        ("F", 5, -1),
        ("a", 2, -1),
        ("B ", 2, -1),
        (" B", 2, -1),
        ("B\n", 2, -1),
        ("B.", 2, -1),
        ("(B)", 2, -1),
        ("B)", 2, -1),
        ("AB", 2, -1),
        ("", 2, -1),
        # A leading "X. ".
        ("B. glass", 2, 1),
        ("B. ", 2, 1),
        ("B.glass", 2, -1),
        ("B.\nglass", 2, -1),
        ("b. glass", 2, -1),
        ("B, glass", 2, -1),
        ("D. four", 3, -1),
        # … which comes before any sentence, and is not taken back where it is no choice.
        ("A. Because the answer is plain. The answer is B.", 2, 0),
        ("D. four. The answer is B.", 3, -1),
        ("F. six. The answer is B.", 3, 1),
        ("E. Coli is a bacterium. The answer is B.", 4, -1),
        ("E. Coli is a bacterium. The answer is B.", 5, 4),
        ("A. The answer is B. The answer is C.", 3, 0),
        # One "The answer is X.".
        ("The answer is B.", 2, 1),
        (f"{LONG}The answer is B.", 2, 1),
        ("Glass is clear. One can see through it. The answer is B.", 2, 1),
        ("The answer is B. BECAUSE: glass is clear.", 2, 1),
        ("So the text has.The answer is B.", 2, 1),
        ("LECTURE: Glass is clear.\nSOLUTION: See.\n###\n The answer is B.", 2, 1),
        ("The answer is C.", 2, -1),
        ("The answer is Z.", 5, -1),
        ("The answer is 2.", 5, -1),
        ("The answer is b.", 2, -1),
        ("the answer is B.", 2, -1),
        ("The answer is  B.", 2, -1),
        ("The answer is (B).", 2, -1),
        ("The answer is: B.", 2, -1),
        ("The answer was B.", 2, -1),
        ("ANSWER: B.", 2, -1),
        # The rule's last character is any, but there has to be one, on the same line.
        ("The answer is B", 2, -1),
        ("The answer is B\n", 2, -1),
        ("The answer is B\nThe answer is A.", 2, 0),
        ("The answer is B, since it is clear.", 2, 1),
        ("The answer is B because it is clear.", 2, 1),
        ("The answer is Because", 2, 1),
        ("The answer is BB.", 2, 1),
        ("The answer is Ann.", 2, 0),
        # More than one is none, also of the same letter, also where only one is a choice.
        ("The answer is A. No, wait. The answer is B.", 2, -1),
        ("The answer is B. The answer is B.", 2, -1),
        ("The answer is B. The answer is Z.", 2, -1),
        ("The answer is B.The answer is B", 2, 1),
        ("The answer is The answer is B.", 2, -1),
    ],
)
def test_the_rules(text, choices, index):
    assert extract(text, choices) == index


@pytest.fixture
def references(tmp_path):
    """Four problems, of each subject and context."""
    problems = {
        "1": problem(image="image.png"),
        "2": problem(hint="A window.", image="image.png", subject="social science", grade="grade7"),
        "3": problem(hint="A window.", subject="language science", grade="grade12"),
        "4": problem(grade="grade6", answer=0),
    }
    write_problems(tmp_path, problems)
    return [reference_of(one) for one in load_problems(tmp_path / "problems.json").values()]


def row(questions: int, correct: int, failed: int = 0, missing: int = 0) -> dict:
    accuracy = correct / questions if questions else None
    counts = {"correct": correct, "failed": failed, "missing": missing}
    return {"questions": questions, "accuracy": accuracy, **counts}


def test_total_columns_and_failures(references):
    scores = scienceqa(["B", "The answer is C.", None, "The answer is B."], references)
    assert scores.all == row(4, 1, failed=1, missing=1)
    assert scores.each == [1, 0, 0, 0]
    assert tuple(scores.types) == COLUMNS
    assert scores.types == {
        "NAT": row(2, 1),
        "SOC": row(1, 0, failed=1),
        "LAN": row(1, 0, missing=1),
        "TXT": row(2, 0, failed=1, missing=1),
        "IMG": row(2, 1, failed=1),
        "NO": row(1, 0),
        "G1-6": row(2, 1),
        "G7-12": row(2, 0, failed=1, missing=1),
    }


def test_a_column_without_a_problem_has_no_accuracy(references):
    assert scienceqa(["B"], references[:1]).types["SOC"] == row(0, 0)


def test_result_files(references):
    layout = result_layout(["B", "The answer is C.", None, "A. wood"], references)
    assert layout == {
        "acc": 50.0,
        "correct": 2,
        "count": 4,
        "results": {"1": 1, "2": -1, "3": -1, "4": 0},
        "outputs": {"1": "B", "2": "The answer is C.", "3": "FAILED", "4": "A. wood"},
    }


def test_recorded_indices_are_compared(references):
    """A random index for a reply without a letter is distinguished from a letter read differently."""
    texts = ["The answer is B.", "nothing", None, "The answer is B."]
    assert differences(texts, references, {"1": 1, "2": 0, "3": 1, "4": 0, "5": 1}) == {
        "compared": 3,
        "differ": 2,
        "differ_with_letter": 1,
    }


@pytest.mark.parametrize("answers", [(), ("wood",), ("C",), ("",), ("AB",)])
def test_a_reference_that_is_not_a_letter_is_named(answers):
    with pytest.raises(DataError, match="question q7: metric=scienceqa compares letters"):
        scienceqa(["A"], [Reference("q7", answers, choices=2)])
