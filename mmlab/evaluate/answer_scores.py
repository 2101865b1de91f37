"""Answers of a model beside the right ones, as files and as a table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlab.data.index import ShardIndex
from mmlab.data.progress import progress
from mmlab.evaluate.answers import Answerer, answer_questions
from mmlab.evaluate.exact_match import matches, score
from mmlab.evaluate.questions import BlindAnswers, Question


def predict(answerer: Answerer, index: ShardIndex, questions: Sequence[Question], batch_size: int) -> list[str]:
    """An answer to each question, with a progress bar."""
    predictions = [""] * len(questions)
    answers = answer_questions(answerer, index, questions, batch_size)
    for n, answer in progress(answers, "answering questions", len(questions)):
        predictions[n] = answer
    return predictions


def answer_scores(
    questions: Sequence[Question], predictions: Sequence[str], blind: Sequence[Question] | None = None
) -> dict[str, Any]:
    """Exact match per question type; with the questions of a training set also what they give away, as `blind`."""
    scores = score(questions, predictions)
    if blind is not None:
        guess = BlindAnswers(blind)
        scores["blind"] = score(questions, [guess(question) for question in questions])
    return scores


def write_predictions(folder: Path, questions: Sequence[Question], predictions: Sequence[str]) -> None:
    """Write `predictions.jsonl`, one line a question, into the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as lines:
        for question, prediction in zip(questions, predictions, strict=True):
            row = {
                "key": question.key,
                "type": question.type,
                "question": question.text,
                "answer": question.answer,
            }
            right = matches(prediction, question.answer)
            lines.write(json.dumps({**row, "prediction": prediction, "right": right}) + "\n")


def answer_table(scores: dict[str, Any]) -> str:
    """The scores as a table, blind answers beside them."""
    blind = scores.get("blind")
    head = f"{'':<14}{'questions':>10}{'accuracy':>10}"
    lines = [head + (f"{'blind':>10}" if blind else "")]
    rows = [("all", scores, blind)] + [(t, s, blind and blind["types"][t]) for t, s in scores["types"].items()]
    for name, row, without in rows:
        tail = f"{without['accuracy']:>10.1%}" if without else ""
        lines.append(f"{name:<14}{row['questions']:>10,}{row['accuracy']:>10.1%}{tail}")
    return "\n".join(lines)
