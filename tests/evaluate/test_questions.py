import pytest
import torch

from mmlab.config.errors import DataError
from mmlab.data.sample_types import ImageSpec
from mmlab.evaluate.questions import BlindAnswers, Question, read_picture, read_questions
from mmlab.evaluate.scores.score_table import Reference
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
        Question(1, "s0001", "what is it?", "a star", "conversation"),
        Question(3, "s0003", "is it blue?", "yes", "question"),
    ]


def test_types_and_limit(index):
    assert [q.answer for q in read_questions(index, ["count", "question"])] == ["1", "yes"]
    assert [q.answer for q in read_questions(index, limit=1)] == ["red"]
    assert [q.answer for q in read_questions(index, ["count"], limit=1)] == ["1"]
    assert len(read_questions(index, limit=99)) == 4


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
    index = make_records(tmp_path / "test", records, [None] * 3)
    questions = read_questions(index)
    assert [question.reference for question in questions] == [
        Reference("s0000", ("B",), ("NAT", "IMG"), "s0000", 3),
        Reference("s0001", ("red", "pink"), ("color",), "s0001"),
        Reference("s0002", ("so",), ("question",), "s0002"),
    ]
    assert questions[0].text == "which?" and questions[0].answer == "Because. The answer is B."
    assert [question.key for question in read_questions(index, ["IMG"])] == ["s0000"]


@pytest.mark.parametrize(
    "record",
    [
        {"questions": [{"question": "what?"}]},
        {"questions": ["what?"]},
        {"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]},
        {"conversations": [{"value": "q"}, {"value": "x"}], "reference": {"choices": "many"}},
        {"questions": [{"question": "what?", "answer": "red", "answers": "red"}]},
    ],
)
def test_a_malformed_question_names_its_sample(tmp_path, record):
    index = make_records(tmp_path / "test", [record], [None])
    with pytest.raises(DataError, match="sample s0000 has a malformed question or reference"):
        read_questions(index)


def test_pictures(index):
    picture = read_picture(index, 0, ImageSpec(16))
    assert picture is not None and picture.shape == (3, 16, 16) and picture.dtype == torch.uint8
    assert read_picture(index, 3, ImageSpec(16)) is None


def test_a_broken_picture_or_record_names_its_sample(tmp_path):
    broken = make_records(tmp_path / "broken", [RECORDS[0]], [png()[:40]])
    with pytest.raises(DataError, match="image of sample s0000 cannot be read"):
        read_picture(broken, 0, ImageSpec(16))


def test_blind_answers_are_the_most_frequent_ones():
    def of(text: str, *answers: str) -> list[Question]:
        return [Question(0, "k", text, answer, "t") for answer in answers]

    blind = BlindAnswers(of("color?", "red", "blue", "blue") + of("how many?", "2", "1", "2", "2", "2"))
    assert [blind(q) for q in of("color?", "") + of("how many?", "")] == ["blue", "2"]
    assert blind(of("never asked?", "")[0]) == "2", "the commonest of all answers"
