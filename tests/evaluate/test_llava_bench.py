"""LLaVA-Bench's files, the judge's prompt, its marks and the table."""

import json

import pytest

from mmlab.config.errors import DataError
from mmlab.evaluate.scores.llava_bench import (
    BenchQuestion,
    bench_scores,
    judge_messages,
    judge_questions,
    marks_of,
    read_bench,
    read_rules,
)

QUESTIONS = [
    {"question_id": 0, "image": "a.jpg", "text": "What is it?", "category": "conv"},
    {"question_id": 1, "image": "a.jpg", "text": "Why?", "category": "complex"},
    {"question_id": 2, "image": "b.jpg", "text": "Describe it.", "category": "detail"},
]
CONTEXTS = [
    {
        "image": "a.jpg",
        "captions": ["A dog.", "A pet."],
        "instances": [{"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]}],
    },
    {"image": "b.jpg", "caption": "A cat."},
]
BASELINE = [{"question_id": n, "text": f"baseline {n}"} for n in range(3)]


@pytest.fixture
def files(tmp_path):
    def write(questions=QUESTIONS, contexts=CONTEXTS, baseline=BASELINE):
        paths = []
        for name, lines in (("questions", questions), ("contexts", contexts), ("baseline", baseline)):
            paths.append(tmp_path / f"{name}.jsonl")
            paths[-1].write_text("\n".join(map(json.dumps, lines)))
        return paths

    return write


def test_the_files(files):
    first, second, third = read_bench(*files())
    context = "A dog.\nA pet.\n\ndog: [0.1, 0.2, 0.3, 0.4]"
    assert first == BenchQuestion("0", "What is it?", "conv", context, "baseline 0")
    assert (second.category, third.context) == ("complex", "A cat.")
    one = [{"image": "a.jpg", "captions": "A dog."}, CONTEXTS[1]]
    assert read_bench(*files(contexts=one))[0].context == "A dog."


def test_the_prompt_has_the_published_order():
    question = BenchQuestion("0", "What is it?", "conv", "A dog.", "A dog, I think.")
    system, user = judge_messages(question, "A cat.", "Judge.")
    assert (system["role"], user["role"]) == ("system", "user")
    assert user["content"] == (
        "[Context]\nA dog.\n\n[Question]\nWhat is it?\n\n"
        "[Assistant 1]\nA dog, I think.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nA cat.\n\n[End of Assistant 2]\n\n[System]\nJudge."
    )


@pytest.mark.parametrize(
    ("reply", "marks"),
    [
        ("8 7\nThe first is better.", (8, 7)),
        ("8, 7", (8, 7)),
        ("\n 9.5  10 \nreasons", (9.5, 10)),
        ("8,7", (8, 7)),
        ("8", None),
        ("8 7 6", None),
        ("Assistant 1: 8, Assistant 2: 7", None),
        ("0 7", None),
        ("11 7", None),
        ("8 -7", None),
        ("", None),
    ],
)
def test_marks(reply, marks):
    assert marks_of(reply) == marks


def test_scores(files):
    questions = read_bench(*files())
    scores = bench_scores(questions, [(8, 6), (10, 9), None])
    nothing = {"relative": None, "mark": None, "baseline_mark": None}
    assert scores.all == {
        "questions": 3,
        "relative": pytest.approx(100 * 15 / 18),
        "mark": 7.5,
        "baseline_mark": 9,
        "unmarked": 1,
    }
    assert scores.types["conv"]["relative"] == 75 and scores.types["complex"]["relative"] == 90
    assert scores.types["detail"] == {"questions": 1, **nothing, "unmarked": 1}
    assert scores.each == [0.6, 0.9, 0]


def test_the_judge_gets_the_rule_of_the_category(files, tmp_path):
    rules = tmp_path / "rule.json"
    rules.write_text(json.dumps({name: {"prompt": f"rule {name}", "role": "Assistant"} for name in ("conv", "detail")}))
    questions, answers = read_bench(*files()), {str(n): f"answer {n}" for n in range(3)}
    asked = judge_questions([questions[0], questions[2]], answers, read_rules(rules))
    (_, first), (_, second) = ((one["content"] for one in messages) for messages in asked)
    assert first.endswith("[System]\nrule conv") and second.endswith("[System]\nrule detail")
    assert "answer 2" in second and "baseline 2" in second
    with pytest.raises(DataError, match="no rule for the category 'complex'"):
        judge_questions(questions, answers, read_rules(rules))
    with pytest.raises(DataError, match="no answer to question 2"):
        judge_questions(questions, {"0": "x", "1": "y"}, {})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"contexts": CONTEXTS[:1]}, "does not describe b.jpg, which question 2 is about"),
        ({"baseline": BASELINE[:2]}, "has no answer to question 2"),
        ({"questions": [{"question_id": 0, "image": "a.jpg"}] * 2}, "does not have the format of LLaVA-Bench"),
        ({"contexts": [{"image": "a.jpg"}, {"image": "b.jpg"}]}, "does not have the format of LLaVA-Bench"),
    ],
)
def test_what_is_missing_is_named(files, wrong, message):
    with pytest.raises(DataError, match=message):
        read_bench(*files(**wrong))
