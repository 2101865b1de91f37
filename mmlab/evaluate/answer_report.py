"""Answers of an evaluation, their scores, and files of them: predictions, a grid of images, the worst answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmlab.data.bad_samples import BadSamples
from mmlab.data.images import decode_image
from mmlab.data.index import ShardIndex
from mmlab.data.progress_bar import progress
from mmlab.data.sample_types import ImageSpec
from mmlab.evaluate.answers import Answerer, AnswerFile, answer_questions
from mmlab.evaluate.questions import CommonestAnswers, Question, read_pictures
from mmlab.evaluate.scores.constant_reply import beside, blind_line, variety_line, with_baselines
from mmlab.evaluate.scores.score_table import Scorer, Scores, cells_of, show
from mmlab.keyed import stream
from mmlab.report.contact_sheet import BAD, GOOD, contact_sheet
from mmlab.report.html_cases import Case, cases_page
from mmlab.runs.disk import write_lines


def predict(
    answerer: Answerer,
    index: ShardIndex,
    questions: Sequence[Question],
    batch_size: int,
    saved: AnswerFile | None = None,
    bad: BadSamples | None = None,
    own: bool = False,
    label: str = "answering questions",
) -> list[str | None]:
    """An answer to each question, None where its sample cannot be used; with a progress bar.

    Args:
        answerer: the model.
        index: the questions' shards.
        questions: any number of questions.
        batch_size, bad, own: as for `answer_questions`.
        saved: answers of an earlier start, which are not computed again; new ones are added batch by batch.
        label: of the progress bar; empty: without.
    """
    predictions = {} if saved is None else dict(saved.answers)
    answers = answer_questions(answerer, index, questions, batch_size, bad, predictions, own)
    batch: dict[int, str] = {}
    for n, answer in progress(answers, label, len(questions) - len(predictions), quiet=not label):
        batch[n] = answer
        if len(batch) == batch_size:
            predictions |= _save(batch, saved)
            batch = {}
    predictions |= _save(batch, saved)
    return [predictions.get(n) for n in range(len(questions))]


def _save(batch: dict[int, str], saved: AnswerFile | None) -> dict[int, str]:
    if saved is not None and batch:
        saved.add(batch)
    return batch


def answer_scores(
    scorer: Scorer,
    questions: Sequence[Question],
    predictions: Sequence[str],
    training: Sequence[Question] | None = None,
    blind: Mapping[int, str] | None = None,
) -> tuple[Scores, dict[str, Any]]:
    """The scores, and as JSON with their baselines.

    Args:
        scorer: of the metric.
        questions, predictions: as many.
        training: questions of the training set, for `question_only`, the scores of `CommonestAnswers`.
        blind: place of a question → its blind answer.
    """
    references = [question.reference for question in questions]
    learned = None if training is None else [question.reference for question in training]
    scores = scorer(predictions, references)
    table = {**scores.as_json(), **with_baselines(scorer, predictions, references, learned, blind)}
    if training is not None:
        guess = CommonestAnswers(training)
        table["question_only"] = scorer([guess(question) for question in questions], references).as_json()
    return scores, table


def notes_of(summary: dict[str, Any]) -> list[str]:
    """Lines for below the table: how varied the replies are, and how much they depend on the pictures."""
    questions, blind = summary["questions"], summary.get("blind")
    return [variety_line(summary["replies"], questions), *([blind_line(blind, questions)] if blind else [])]


def write_predictions(
    folder: Path,
    questions: Sequence[Question],
    predictions: Sequence[str],
    each: Sequence[float],
    blind: Mapping[int, str] | None = None,
) -> None:
    """Write `predictions.jsonl`, one line per question, into the folder, which is created.

    Args:
        folder: where.
        questions, predictions: as many.
        each: score of each prediction.
        blind: place of a question → its blind answer.
    """
    unseen = blind or {}
    write_lines(
        folder / "predictions.jsonl",
        (
            {
                "key": question.key,
                "type": question.type,
                **({"turn": len(question.earlier)} if question.earlier else {}),
                "question": question.text,
                "answer": question.answer,
                "prediction": prediction,
                **({"blind": unseen[n]} if n in unseen else {}),
                "right": score >= 1,
                "score": score,
            }
            for n, (question, prediction, score) in enumerate(zip(questions, predictions, each, strict=True))
        ),
    )


GRID_SIDE = 224
GRID_TYPES = 12  # rows of the table on the sheet; scores.json has all of them


def draw_grid(
    index: ShardIndex,
    questions: Sequence[Question],
    predictions: Sequence[str],
    scores: Scores,
    summary: dict[str, Any],
    cells: int = 24,
) -> Image.Image:
    """A contact sheet of some questions, drawn once for all, green if the answer is entirely right, else red.

    Args:
        index: the questions' shards.
        questions: all questions.
        predictions: an answer to each.
        scores: scores of the predictions.
        summary: the scores as JSON, with their baselines, for the title and the table.
        cells: this many questions are shown.
    """
    # Drawn: of every n-th question, all could be the first one about their picture.
    chosen = sorted(stream(0, "grid").sample(range(len(questions)), min(cells, len(questions))))
    pictures = [_side_by_side(index, questions[n].sample, GRID_SIDE) for n in chosen]
    right = [scores.each[n] >= 1 for n in chosen]
    texts = [_text(questions[n], predictions[n], ok) for n, ok in zip(chosen, right, strict=True)]
    title = f"{show(scores.main, scores.all[scores.main])} of {len(questions):,} questions"
    title += f" ({beside(scores.main, summary)})"
    table = cells_of(summary, scores.main, short=True)
    if (further := len(table) - GRID_TYPES - 2) > 0:
        table = [*table[: GRID_TYPES + 2], [f"{further} more", *[""] * (len(table[0]) - 1)]]
    colors = [GOOD if ok else BAD for ok in right]
    return contact_sheet(pictures, texts, columns=6, colors=colors, title=title, table=table)


def _side_by_side(index: ShardIndex, sample: int, side: int) -> Tensor | None:
    """A sample's pictures in one row with white between them, uint8 `[3, side, W]`; None if it has none."""
    row: list[Tensor] = []
    for data in read_pictures(index, sample):
        row += [torch.full((3, side, side // 16), 255, dtype=torch.uint8)] if row else []
        row.append(decode_image(data, ImageSpec(side)))
    return torch.cat(row, -1) if row else None


def _text(question: Question, prediction: str, right: bool) -> str:
    return f"{question.text}\n{prediction or '(nothing)'}" + ("" if right else f" (right: {question.answer})")


PAGE_SIDE = 320


def worst(each: Sequence[float], count: int) -> list[int]:
    """The places of the lowest scores below 1, in order of score; if equal ones do not all fit, evenly spread ones."""
    places: list[int] = []
    for score in sorted({score for score in each if score < 1}):
        equal = [n for n, other in enumerate(each) if other == score]
        room = count - len(places)
        if room <= 0:
            break
        step = max(1.0, len(equal) / room)
        places += [equal[int(i * step)] for i in range(min(room, len(equal)))]
    return places


def worst_page(
    index: ShardIndex,
    questions: Sequence[Question],
    predictions: Sequence[str],
    scores: Scores,
    summary: dict[str, Any],
    blind: Mapping[int, str] | None = None,
    count: int = 48,
) -> str:
    """The worst `count` answers as HTML: image, question, answer, blind and right answers, below the table.

    Args:
        index, questions, predictions, scores, summary: as for `draw_grid`.
        blind: place of a question → its blind answer.
        count: number of answers.
    """
    chosen = worst(scores.each, count)
    cases = [
        Case(
            _side_by_side(index, questions[n].sample, PAGE_SIDE),
            f"{questions[n].key} · {', '.join(questions[n].reference.types)} · {scores.each[n]:.2f}",
            {
                **({"question": questions[n].text} if questions[n].text else {}),
                "answer": predictions[n] or "(nothing)",
                **({"blind": blind[n] or "(nothing)"} if blind and n in blind else {}),
                "right": " · ".join(dict.fromkeys(questions[n].reference.answers)),
            },
        )
        for n in chosen
    ]
    missed = sum(score < 1 for score in scores.each)
    whole = f"{scores.main.replace('_', ' ')} {show(scores.main, scores.all[scores.main])}"
    title = f"{whole} of {len(questions):,} questions ({beside(scores.main, summary)})"
    table = cells_of(summary, scores.main)
    return cases_page(f"{title}; {len(chosen)} of {missed:,} not entirely right", cases, table, notes_of(summary))
