"""Exact match: the score of questions whose answer is a word or two."""

from collections.abc import Sequence
from typing import Any

from mmlab.evaluate.questions import Question


def normalise(answer: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(answer.lower().split()).rstrip(".").strip()


def matches(prediction: str, answer: str) -> bool:
    """Whether a prediction is the answer, apart from case, spaces and a full stop at the end."""
    return normalise(prediction) == normalise(answer)


def score(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, Any]:
    """Share of right answers, in all and per question type: `{accuracy, questions, types: {type: {…}}}`."""
    right = [matches(p, q.answer) for q, p in zip(questions, predictions, strict=True)]
    types: dict[str, list[bool]] = {}
    for question, ok in zip(questions, right, strict=True):
        types.setdefault(question.type, []).append(ok)
    per_type = {name: {"accuracy": sum(oks) / len(oks), "questions": len(oks)} for name, oks in sorted(types.items())}
    return {"accuracy": sum(right) / len(right), "questions": len(right), "types": per_type}
