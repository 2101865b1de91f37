"""Well-formed replies, and each way in which they can be malformed."""

import pytest

from mmlab.curate.llava_instruct_steps import Malformed, parse_description, parse_dialogue, parse_reply

ONE = "Question:\nWhat is it?\n===\nAnswer:\nA cat."


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        (ONE, [("What is it?", "A cat.")]),
        (f"\n {ONE}\n===\nQuestion:\nWhere?\n===\nAnswer:\nHere.\n\nOr there.\n", [
            ("What is it?", "A cat."), ("Where?", "Here.\n\nOr there."),
        ]),
        ("Question: What is it?\n=====\nAnswer : A cat.", [("What is it?", "A cat.")]),
        (f"===\n{ONE}\n===\n", [("What is it?", "A cat.")]),
        ("Question:\r\nWhat?\r\n===\r\nAnswer:\r\nA = b, a == b.", [("What?", "A = b, a == b.")]),
        ("Question:\nWhat is the question: to be?\n===\nAnswer:\nThe Answer: is no label here.", [
            ("What is the question: to be?", "The Answer: is no label here."),
        ]),
    ],
)  # fmt: skip
def test_dialogues(text, pairs):
    assert parse_dialogue(text) == pairs


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty turn"),
        ("===", "empty turn"),
        ("A cat sits on a mat.", "text without a label"),
        (f"Here is a dialogue.\n{ONE}", "text without a label"),
        (f"Sure!\n===\n{ONE}", "text without a label"),
        (f"{ONE}\n===\nI hope that helps.", "text without a label"),
        ("Answer:\nA cat.\n===\nQuestion:\nWhat is it?", "labels out of order"),
        ("Question:\nWhat?\n===\nQuestion:\nWhere?\n===\nAnswer:\nHere.", "labels out of order"),
        ("Question:\nWhat is it?\nAnswer:\nA cat.", "label within a turn"),
        (f"{ONE}\nQuestion:\nWhere?\n===\nAnswer:\nHere.", "label within a turn"),
        (f"{ONE}\n===\nQuestion:\nWhere?", "question without an answer"),
        ("Question:\n===\nAnswer:\nA cat.", "empty turn"),
        (f"{ONE}\nQUESTION: Where? Answer: Here.", "label within a turn"),
        (f"{ONE}\n**Question 2:** Where?", "label within a turn"),
        ("Question:\nWhat?\n===\n===\nAnswer:\nA cat.", "empty turn"),
        ("question:\nWhat?\n===\nanswer:\nA cat.", "text without a label"),
        ("Question:\nWhat is in <image>?\n===\nAnswer:\nA cat.", "image marker"),
    ],
)
def test_malformed_dialogues(text, reason):
    with pytest.raises(Malformed) as caught:
        parse_dialogue(text)
    assert str(caught.value) == reason


def test_descriptions():
    assert parse_description(" One.\n\nTwo.\n") == "One.\n\nTwo."
    for text, reason in ((" ", "empty turn"), (ONE, "labels in a description"), ("A <image>.", "image marker")):
        with pytest.raises(Malformed, match=reason):
            parse_description(text)


def test_each_type_has_its_form():
    two = f"{ONE}\n===\n{ONE}"
    assert len(parse_reply(two, "conversation")) == 2 and len(parse_reply(ONE, "conversation")) == 1
    assert parse_reply(ONE, "complex_reasoning") == [("What is it?", "A cat.")]
    with pytest.raises(Malformed, match="several questions"):
        parse_reply(two, "complex_reasoning")
    assert parse_reply("A cat.", "detail_description", "What is it?") == [("What is it?", "A cat.")]
