"""An evaluation that is killed goes on with what was answered."""

import pytest

from mmlab.data.index import ShardIndex
from mmlab.evaluate.answer_report import predict
from mmlab.evaluate.answers import KeptAnswers
from mmlab.evaluate.questions import read_questions
from tests.tiny_shapes import make_records

ABOUT = {"parts": {"language": "abc"}, "limit": None}


def test_answers_are_read_again(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    kept = KeptAnswers(path, ABOUT)
    assert kept.known == {} and not path.exists()
    kept.add({4: "a\nb", 1: "ü\u2028"})
    kept.add({0: ""})
    assert KeptAnswers(path, dict(reversed(ABOUT.items()))).known == {4: "a\nb", 1: "ü\u2028", 0: ""}
    kept.remove()
    assert not path.exists() and KeptAnswers(path, ABOUT).known == {}


def test_half_a_line_is_cut_off(tmp_path):
    path = tmp_path / "answers.jsonl"
    KeptAnswers(path, ABOUT).add({0: "first", 1: "second"})
    path.write_bytes(path.read_bytes()[:-4])
    kept = KeptAnswers(path, ABOUT)
    assert kept.known == {0: "first"}
    kept.add({1: "again"})
    assert KeptAnswers(path, ABOUT).known == {0: "first", 1: "again"}


def test_answers_to_anything_else_are_thrown_away(tmp_path):
    path = tmp_path / "answers.jsonl"
    KeptAnswers(path, ABOUT).add({0: "first"})
    other = KeptAnswers(path, {**ABOUT, "limit": 3})
    assert other.known == {}
    other.add({2: "new"})
    assert KeptAnswers(path, ABOUT).known == {} and KeptAnswers(path, {**ABOUT, "limit": 3}).known == {2: "new"}


class Repeats:
    """Answers each question with its own text, and dies where it is told to."""

    spec = None

    def __init__(self, batches: int):
        self.batches = batches
        self.asked: list[str] = []

    def ask(self, question, picture):
        return question

    def __call__(self, dialogues, pictures):
        if self.batches == 0:
            raise KeyboardInterrupt
        self.batches -= 1
        self.asked += dialogues
        return [f"{text}!" for text in dialogues]


def test_what_was_answered_is_not_asked_again(tmp_path):
    records = [{"questions": [{"question": f"number {n}?", "answer": "1"}]} for n in range(7)]
    index: ShardIndex = make_records(tmp_path / "shards", records, [None] * 7)
    questions = read_questions(index)
    first, path = Repeats(2), tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        predict(first, index, questions, 2, KeptAnswers(path, ABOUT))  # type: ignore[arg-type]
    second = Repeats(9)
    predictions = predict(second, index, questions, 2, KeptAnswers(path, ABOUT))  # type: ignore[arg-type]
    assert predictions == [f"number {n}?!" for n in range(7)]
    assert len(first.asked) == 4 and sorted(first.asked + second.asked) == [f"number {n}?" for n in range(7)]
    third = Repeats(0)
    assert predict(third, index, questions, 2, KeptAnswers(path, ABOUT)) == predictions  # type: ignore[arg-type]
