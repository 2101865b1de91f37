from mmlab.data.config import Prompt
from mmlab.data.dialogues import conversations_of
from mmlab.data.formats import record_texts
from mmlab.data.record_turns import question_of
from tests.data.test_dialogues import pairs, talk


def test_a_question_may_have_follow_ups_and_a_system_message() -> None:
    said = [{"from": "system", "value": "s"}, *talk("<image>\nfirst?", "one", "then?", "two")["conversations"]]
    item = question_of(said, 1)
    assert item == {
        **{"system": "s", "question": "first?", "answer": "one"},
        "follow_ups": [{"question": "then?", "answer": "two"}],
    }
    record = {"questions": [item, {"question": "other?", "answer": "three"}]}
    first, second = conversations_of(record, Prompt(), 0)
    assert [turn.text for turn in first] == ["<image>\nfirst?", "one", "then?", "two"]
    assert first[0].system == "s" and second[0].text == "<image>\nother?" and second[0].system is None
    assert record_texts(record) == ["first?", "one", "then?", "two", "other?", "three"]
    drawn = {pairs(record, Prompt("plain"), seed)[0] for seed in range(20)}
    assert drawn == {("<image>", "two"), ("<image>", "three")}, "without a caption, the last answer to a question"


def test_a_question_keeps_the_markers_of_several_images() -> None:
    for questions in (["<image> or <image>?"], ["Which?", "Why?"], ["Is <image> new?", "And\n<image>"]):
        said = talk(*(text for question in questions for text in (question, "a")))
        item = question_of(said["conversations"], 2)
        assert [item["question"], *(one["question"] for one in item.get("follow_ups", []))] == questions
        assert conversations_of({"questions": [item]}, Prompt(), 0, 2) == conversations_of(said, Prompt(), 0, 2)
