from typing import Any

import pytest
import torch

from mmlab.config.errors import DataError
from mmlab.data.bad_samples import BadSamples
from mmlab.data.sample_types import ImageSpec, SampleError
from mmlab.data.shard_files import ShardWriter
from mmlab.evaluate.questions import CommonestAnswers, Question, read_picture, read_questions
from mmlab.evaluate.scores.score_table import UNTYPED, Reference
from tests.tiny_files import png
from tests.tiny_shapes import make_records


def ask(*items: tuple[str, str, str]) -> dict:
    names = ("question", "answer", "type")
    return {"questions": [dict(zip(names, item, strict=True)) for item in items]}


RECORDS = [
    ask(("what color is it?", "red", "color"), ("how many are there?", "1", "count")),
    {
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is it?"},
            {"from": "gpt", "value": "a star"},
            {"from": "human", "value": "is it red?"},
            {"from": "gpt", "value": "no"},
        ]
    },
    {"caption": "nothing is asked here"},
    {"questions": [{"question": "is it blue?", "answer": "yes"}]},
]


@pytest.fixture
def index(tmp_path):
    return make_records(tmp_path / "test", RECORDS, [png(), png(4, 4), None, None])


def test_questions_come_in_their_order(index):
    assert read_questions(index) == [
        Question(0, "s0000", "what color is it?", "red", "color"),
        Question(0, "s0000", "how many are there?", "1", "count"),
        Question(1, "s0001", "what is it?", "a star", UNTYPED),
        Question(1, "s0001", "is it red?", "no", UNTYPED, earlier=(("what is it?", "a star"),)),
        Question(3, "s0003", "is it blue?", "yes", UNTYPED),
    ]


def test_types_and_limit(index):
    assert [q.answer for q in read_questions(index, ["count", UNTYPED])] == ["1", "a star", "no", "yes"]
    assert [q.answer for q in read_questions(index, limit=1)] == ["red"]
    assert [q.answer for q in read_questions(index, ["count"], limit=1)] == ["1"]
    assert len(read_questions(index, limit=99)) == 5


ASKED = {"question": "c?", "answer": "d"}


def test_the_type_of_a_record(tmp_path):
    turns = [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "2"}]
    records = [
        {"conversations": turns * 2, "type": "count"},
        {
            "questions": [{"question": "a?", "answer": "b"}, {"question": "c?", "answer": "d", "type": "own"}],
            "type": "count",
        },
        {"conversations": turns},
    ]
    index = make_records(tmp_path / "test", records, [None] * 3)
    assert [question.type for question in read_questions(index)] == ["count"] * 3 + ["own", UNTYPED]
    assert len(read_questions(index, ["count"])) == 3 and len(read_questions(index, [UNTYPED])) == 1


def test_turns_are_those_that_training_uses(tmp_path):
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "it"}]
    brief = {"from": "system", "value": "Be brief."}
    records = [
        {"conversations": [brief, *turns, *turns]},
        {"conversations": [turns[1], *turns, turns[0]]},
        {"conversations": [turns[0], *turns]},
        {"conversations": [turns[0], {"from": "gpt", "value": " "}]},
    ]
    index = make_records(tmp_path / "test", records, [None] * 4)
    bad = BadSamples("test", 4)
    assert read_questions(index, bad=bad) == [
        Question(0, "s0000", "what?", "it", UNTYPED, system="Be brief."),
        Question(0, "s0000", "what?", "it", UNTYPED, earlier=(("what?", "it"),), system="Be brief."),
        Question(1, "s0001", "what?", "it", UNTYPED),
    ]
    assert bad.reasons == {"order": 1, "empty-answer": 1}


def test_later_turns_of_a_question_are_asked_with_their_history(tmp_path):
    item = {**ASKED, "type": "letters", "system": "Be brief.", "follow_ups": [{"question": "e?", "answer": "f"}]}
    index = make_records(tmp_path / "test", [{"questions": [{"question": "a?", "answer": "b"}, item]}], [png()])
    assert read_questions(index) == [
        Question(0, "s0000", "a?", "b", UNTYPED),
        Question(0, "s0000", "c?", "d", "letters", system="Be brief."),
        Question(0, "s0000", "e?", "f", "letters", earlier=(("c?", "d"),), system="Be brief."),
    ]


def test_an_unknown_type_suggests_the_nearest(index, tmp_path):
    says = r"no question of type colour; its types are color, .* Did you mean 'color'"
    with pytest.raises(DataError, match=says):
        read_questions(index, ["colour"])
    captions = make_records(tmp_path / "captions", [{"caption": "a star"}], [png()])
    with pytest.raises(DataError, match="has no question; it has none"):
        read_questions(captions)


def test_references(tmp_path):
    turns = [{"from": "human", "value": "which?\n<image>"}, {"from": "gpt", "value": "Because. The answer is B."}]
    records = [
        {"conversations": turns, "reference": {"answers": ["B"], "choices": 3, "types": ["NAT", "IMG"]}},
        {"questions": [{"question": "what?", "answer": "red", "answers": ["red", "pink"], "type": "color"}]},
        {"questions": [{"question": "how?", "answer": "so"}]},
    ]
    index = make_records(tmp_path / "test", records, [png(), None, None])
    questions = read_questions(index)
    assert [question.reference for question in questions] == [
        Reference("s0000", ("B",), ("NAT", "IMG"), "s0000", 3),
        Reference("s0001", ("red", "pink"), ("color",), "s0001"),
        Reference("s0002", ("so",), (UNTYPED,), "s0002"),
    ]
    assert questions[0].text == "which?" and questions[0].answer == "Because. The answer is B."
    assert [question.key for question in read_questions(index, ["IMG"])] == ["s0000"]


MALFORMED: list[tuple[Any, str]] = [
    ({"questions": [{"question": "what?"}]}, "empty-answer"),
    ({"questions": [{"question": "what?", "answer": 2}]}, "empty-answer"),
    ({"questions": ["what?"]}, "turns"),
    ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}, "empty-question"),
    ({"conversations": [{"value": "q"}, {"value": "x"}]}, "role"),
    ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}, "no-picture"),
    ({"questions": [{"question": "what?", "answer": "red", "choices": "many"}]}, "reference"),
    ({"questions": [{"question": "what?", "answer": "red", "answers": "red"}]}, "reference"),
    (b'{"caption": "\\ud83d"}', "unicode"),
    (b"{", "json"),
]


def test_samples_with_malformed_questions_are_left_out(tmp_path):
    with ShardWriter(tmp_path / "test", quiet=True) as writer:
        for n, (record, _) in enumerate(MALFORMED):
            writer.write(f"s{n}", {"json": record})
        writer.write("good", {"json": RECORDS[3]})
    bad = BadSamples("test", 11)
    assert [question.key for question in read_questions(writer.index, bad=bad)] == ["good"]
    assert {key: error.reason for key, error in bad.errors.items()} == {
        f"s{n}": reason for n, (_, reason) in enumerate(MALFORMED)
    }
    with pytest.raises(DataError, match=r"11 samples cannot be used .* of 11, which is more than bad_budget=0"):
        bad.add("one more", SampleError("json", "x"))


def test_nothing_but_malformed_questions(tmp_path):
    index = make_records(tmp_path / "test", [{"questions": [{"question": "what?"}]}], [None])
    with pytest.raises(DataError, match=r"has no questions that can be used: .*\(empty-answer 1\), such as 's0000'"):
        read_questions(index)


def test_pictures(index):
    picture = read_picture(index, 0, ImageSpec(16))
    assert picture is not None and picture.shape == (3, 16, 16) and picture.dtype == torch.uint8
    assert read_picture(index, 3, ImageSpec(16)) is None


def test_a_broken_picture(tmp_path):
    broken = make_records(tmp_path / "broken", [RECORDS[0]], [png()[:40]])
    with pytest.raises(SampleError, match="unreadable image"):
        read_picture(broken, 0, ImageSpec(16))


def test_the_commonest_answers():
    def of(text: str, *answers: str) -> list[Question]:
        return [Question(0, "k", text, answer, "t") for answer in answers]

    guess = CommonestAnswers(of("color?", "red", "blue", "blue") + of("how many?", "2", "1", "2", "2", "2"))
    assert [guess(q) for q in of("color?", "") + of("how many?", "")] == ["blue", "2"]
    assert guess(of("never asked?", "")[0]) == "2", "the commonest of all answers"
