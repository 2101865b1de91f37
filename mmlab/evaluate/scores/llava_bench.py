"""LLaVA-Bench: a language model that does not see the image grades two answers, a model's and a baseline's.

The judge reads a textual description of the image, the question, and both answers, the baseline's first; it gives each
a mark from 1 to 10. A model's score is its share of the baseline's marks (Visual Instruction Tuning, section 5.1).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlab.config.errors import DataError, nearest
from mmlab.evaluate.scores.recorded_outputs import load, read_predictions
from mmlab.evaluate.scores.score_table import Reference, Row, Scores, rows_of
from mmlab.runs.disk import write_lines

SYSTEM = "You compare answers to questions about pictures. You are strict, fair and brief."
INSTRUCTION = """The context above tells what is in a picture that the user saw: sentences about it and, where there are any, its objects with their boxes as left, top, right, bottom in shares of its width and height. Mark both answers to the user's question from 1 to 10 by how helpful, relevant, accurate and detailed they are; their order must not count. Write the two marks alone on the first line, that of Assistant 1 first and a space between them, and your reasons below."""  # noqa: E501

_MARKS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*[, ]\s*(\d+(?:\.\d+)?)\s*")

Marks = tuple[float, float]
Review = tuple[str, str]
"""The judge's reply and an empty text; or an empty text and the reason why there is no reply."""


@dataclass(frozen=True)
class BenchQuestion:
    """A question, with the judge's context and baseline.

    Attributes:
        key: its id.
        text: the question.
        category: such as `conv`, `detail`, `complex`.
        context: textual description of the image.
        baseline: the answer to compare with.
    """

    key: str
    text: str
    category: str
    context: str
    baseline: str


def read_bench(questions: str | Path, contexts: str | Path, baseline: str | Path) -> list[BenchQuestion]:
    """Read LLaVA's files.

    Args:
        questions: lines of `{question_id, image, text, category}`.
        contexts: lines of `{image, captions, instances}`, or `{image, caption}`.
        baseline: answers, in any layout of recorded outputs.

    Raises:
        DataError: a file with another layout, or a question without a context or a baseline.
    """
    described = {}
    bench = []
    answers = read_predictions(baseline).texts
    try:
        for one in _lines(contexts):
            described[str(one["image"])] = _context(one)
        for one in _lines(questions):
            key, image = str(one["question_id"]), str(one["image"])
            if image not in described:
                raise DataError(f"{contexts} does not describe {image}, which question {key} is about.")
            if key not in answers:
                raise DataError(f"{baseline} has no answer to question {key}.")
            bench.append(BenchQuestion(key, one["text"], str(one["category"]), described[image], answers[key]))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{questions} or {contexts} does not have the format of LLaVA-Bench: {error!r}.") from error
    return bench


def judge_messages(question: BenchQuestion, answer: str, instruction: str = INSTRUCTION) -> list[dict[str, str]]:
    """The messages to the judge, in the published order: context, question, both answers, instruction."""
    sections = [
        f"[Context]\n{question.context}",
        f"[Question]\n{question.text}",
        f"[Assistant 1]\n{question.baseline}\n\n[End of Assistant 1]",
        f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]",
        f"[System]\n{instruction}",
    ]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n\n".join(sections)}]


def read_rules(path: str | Path) -> dict[str, str]:
    """Category → instruction, from LLaVA's `rule.json`: `{category: {prompt, role}}`.

    Raises:
        DataError: another format.
    """
    loaded = load(Path(path))
    try:
        return {name: str(rule["prompt"]) for name, rule in loaded.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not of the form {{category: {{prompt}}}}: {error!r}.") from error


def judge_questions(
    questions: Sequence[BenchQuestion], answers: Mapping[str, str], rules: Mapping[str, str]
) -> list[list[dict[str, str]]]:
    """The messages to the judge about each question, after checking that all answers and rules are there.

    Args:
        questions: of the bench.
        answers: id → the model's answer.
        rules: category → instruction of the judge; empty: `INSTRUCTION` for all.

    Raises:
        DataError: a question without an answer, or a category without a rule.
    """
    for question in questions:
        if question.key not in answers:
            raise DataError(f"the predictions have no answer to question {question.key}.")
        if rules and question.category not in rules:
            raise DataError(
                f"there is no rule for the category '{question.category}'.{nearest(question.category, rules)}"
            )
    return [judge_messages(q, answers[q.key], rules.get(q.category, INSTRUCTION)) for q in questions]


def marks_of(reply: str) -> Marks | None:
    """The marks of the baseline and the model from a reply's first line; None unless they are two of 1 to 10."""
    first = reply.strip().partition("\n")[0]
    match = _MARKS.fullmatch(first)
    marks = (float(match[1]), float(match[2])) if match else None
    return marks if marks and all(1 <= mark <= 10 for mark in marks) else None


def bench_scores(questions: Sequence[BenchQuestion], marks: Sequence[Marks | None]) -> Scores:
    """The model's marks as a percentage of the baseline's, overall and per category.

    A reply without marks is left out and counted as `unmarked`; the published script counts it as -1 for both.
    """

    def row(places: list[int]) -> Row:
        pairs = [pair for n in places if (pair := marks[n]) is not None]
        theirs, ours = sum(mark for mark, _ in pairs), sum(mark for _, mark in pairs)
        return {
            "questions": len(places),
            "relative": 100 * ours / theirs if pairs else None,
            "mark": ours / len(pairs) if pairs else None,
            "baseline_mark": theirs / len(pairs) if pairs else None,
            "unmarked": len(places) - len(pairs),
        }

    references = [Reference(question.key, (question.baseline,), (question.category,)) for question in questions]
    each = [0.0 if pair is None else pair[1] / 10 for pair in marks]
    return Scores(*rows_of(references, row), each, main="relative")


def write_marks(
    path: Path, questions: Sequence[BenchQuestion], reviews: Sequence[Review], marks: Sequence[Marks | None]
) -> None:
    """Write a line for each question: marks, review, or the reason why there is none."""
    write_lines(
        path,
        (
            {"key": question.key, "category": question.category, "marks": pair, "review": text, "fault": fault}
            for question, (text, fault), pair in zip(questions, reviews, marks, strict=True)
        ),
    )


def _lines(path: str | Path) -> list[Any]:
    loaded = load(Path(path))
    return loaded if isinstance(loaded, list) else [loaded]  # one line alone is an object


def _context(one: dict[str, Any]) -> str:
    captions = one["captions"] if "captions" in one else one["caption"]
    captions = [captions] if isinstance(captions, str) else captions
    boxes = "\n".join(f"{thing['category']}: {thing['bbox']}" for thing in one.get("instances") or [])
    return "\n\n".join(filter(None, ("\n".join(captions), boxes)))
