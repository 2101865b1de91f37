import pytest

from mmlab.evaluate.scores.score import Reference
from mmlab.evaluate.scores.scorers import facts, says


@pytest.mark.parametrize(
    ("text", "fact", "said"),
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
def test_a_fact_is_said_in_whole_words(text, fact, said):
    assert says(text, fact) == said


def test_the_share_of_facts_and_of_replies_that_have_them_all():
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
