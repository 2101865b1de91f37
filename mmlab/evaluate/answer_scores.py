"""Answers of a model beside the right ones, as files and as a table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlab.data.index import ShardIndex
from mmlab.data.progress import progress
from mmlab.evaluate.answers import Answerer, answer_questions
from mmlab.evaluate.kept_answers import KeptAnswers
from mmlab.evaluate.questions import BlindAnswers, Question
from mmlab.evaluate.scores import Scorer, Scores


def predict(
    answerer: Answerer,
    index: ShardIndex,
    questions: Sequence[Question],
    batch_size: int,
    kept: KeptAnswers | None = None,
) -> list[str]:
    """An answer to each question, with a progress bar.

    Args:
        answerer: the model.
        index: the questions' shards.
        questions: any number.
        batch_size: questions at a time.
        kept: answers of an earlier start, which are not asked for again; new ones are added batch by batch.
    """
    known = {} if kept is None else kept.known
    open_places = [n for n in range(len(questions)) if n not in known]
    answers = answer_questions(answerer, index, [questions[n] for n in open_places], batch_size)
    batch: dict[int, str] = {}
    predictions = dict(known)
    for at, answer in progress(answers, "answering questions", len(open_places)):
        batch[open_places[at]] = answer
        if len(batch) == batch_size or len(predictions) + len(batch) == len(questions):
            predictions |= batch
            if kept is not None:
                kept.add(batch)
            batch = {}
    return [predictions[n] for n in range(len(questions))]


def answer_scores(
    scorer: Scorer,
    questions: Sequence[Question],
    predictions: Sequence[str],
    blind: Sequence[Question] | None = None,
) -> tuple[Scores, dict[str, Any]]:
    """The scores, and the same as JSON; with the questions of a training set also what they give away, as `blind`."""
    references = [question.reference for question in questions]
    scores = scorer(predictions, references)
    found = scores.as_json()
    if blind is not None:
        guess = BlindAnswers(blind)
        found["blind"] = scorer([guess(question) for question in questions], references).as_json()
    return scores, found


def write_predictions(
    folder: Path, questions: Sequence[Question], predictions: Sequence[str], each: Sequence[float]
) -> None:
    """Write `predictions.jsonl`, one line a question, into the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as lines:
        for question, prediction, score in zip(questions, predictions, each, strict=True):
            row = {
                "key": question.key,
                "type": question.type,
                "question": question.text,
                "answer": question.answer,
                "prediction": prediction,
                "right": score >= 1,
                "score": score,
            }
            lines.write(json.dumps(row) + "\n")
