"""POPE's and MME's scores, compared with values computed by hand."""

import pytest

from mmlab.config.errors import DataError
from mmlab.evaluate.scores.score_table import Reference
from mmlab.evaluate.scores.yes_no import mme, mme_answer, pope, pope_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("No, there is none.", "no"),
        ("There is not a cat", "no"),
        ("there is no cat", "no"),
        ("Yes. There is no dog.", "yes"),
        ("NO", "yes"),
        ("Nothing", "yes"),
        ("not.", "no"),
        ("", "yes"),
    ],
)
def test_how_pope_reads_a_reply(text, answer):
    assert pope_answer(text) == answer


def labelled(*answers: str, kind: str = "random") -> list[Reference]:
    return [Reference(f"{kind}{n}", (answer,), (kind,)) for n, answer in enumerate(answers)]


def test_pope():
    # 3 hits, 1 false alarm, 2 misses, 4 right refusals.
    said = ["Yes"] * 3 + ["Yes"] + ["No"] * 2 + ["No."] * 4
    true = ["yes"] * 3 + ["no"] + ["yes"] * 2 + ["no"] * 4
    scores = pope(said, labelled(*true))
    assert scores.main == "f1" and scores.each == [1, 1, 1, 0, 0, 0, 1, 1, 1, 1]
    expected = {"accuracy": 0.7, "precision": 3 / 4, "recall": 3 / 5, "f1": 2 / 3, "yes_share": 0.4}
    assert scores.all == {"questions": 10, "neither": 0, **{name: pytest.approx(x) for name, x in expected.items()}}
    assert scores.types == {"random": scores.all}


def test_pope_without_a_yes():
    never = pope(["No", "No"], labelled("no", "no")).all
    assert (never["precision"], never["recall"], never["f1"], never["accuracy"]) == (None, None, None, 1)
    missed = pope(["No"], labelled("yes")).all
    assert (missed["precision"], missed["recall"], missed["f1"]) == (None, 0, 0)


def test_pope_counts_replies_with_neither_word():
    scores = pope(["A cat.", None, "Yes", "Cannot say"], labelled("yes", "no", "yes", "no"))
    assert scores.all["neither"] == 3 and scores.all["yes_share"] == 0.75, "such a reply counts as yes"


def test_a_missing_reply_is_wrong_for_pope():
    scores = pope([None, None, "Yes"], labelled("yes", "no", "yes"))
    assert scores.each == [0, 0, 1] and scores.all["yes_share"] == pytest.approx(1 / 3)
    assert (scores.all["precision"], scores.all["recall"]) == (1, 0.5)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Yes", "yes"), ("yes, it is", "yes"), ("No.", "no"), (" no", "no"), ("It is not", "other"), ("", "other")],
)
def test_how_mme_reads_a_reply(text, answer):
    assert mme_answer(text) == answer


def pair(picture: str, task: str) -> list[Reference]:
    return [Reference(f"{picture}-{answer}", (answer,), (task,), picture) for answer in ("Yes", "No")]


def test_mme():
    references = [*pair("a", "count"), *pair("b", "count"), *pair("a", "code_reasoning"), *pair("c", "mine")]
    said = ["Yes", "No", "Yes", "Yes, sure", "No", "hm", None, "No"]
    scores = mme(said, references)
    assert scores.types == {
        "count": {"score": 125, "accuracy": 0.75, "accuracy_plus": 0.5, "questions": 4, "other": 0},
        "code_reasoning": {"score": 0, "accuracy": 0, "accuracy_plus": 0, "questions": 2, "other": 1},
        "mine": {"score": 50, "accuracy": 0.5, "accuracy_plus": 0, "questions": 2, "other": 1},
    }
    assert list(scores.types) == ["count", "code_reasoning", "mine"]
    first = scores.all
    assert (first["score"], first["perception"], first["cognition"], first["accuracy"]) == (175, 125, 0, 0.5)


def test_mme_without_tasks():
    references = [Reference(f"q{n}", (answer,), (), "a") for n, answer in enumerate(("yes", "no"))]
    assert mme(["yes", "yes"], references).all["score"] == 50


def test_mme_needs_pairs():
    with pytest.raises(DataError, match="two questions about each image, not 1 about b"):
        mme(["Yes"] * 3, [*pair("a", "count"), pair("b", "count")[0]])


@pytest.mark.parametrize("scorer", [pope, mme])
def test_an_answer_that_is_neither_yes_nor_no_is_named(scorer):
    with pytest.raises(DataError, match=r"question q: the right answer must be yes or no, not 'maybe'"):
        scorer(["yes"], [Reference("q", ("maybe",), ("t",), "p")])
