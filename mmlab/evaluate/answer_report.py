"""The answers of an evaluation as files: a table of scores, a grid of pictures, a page of the worst answers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmlab.data.index import ShardIndex
from mmlab.data.progress_bar import progress
from mmlab.data.sample import ImageSpec
from mmlab.evaluate.answers import Answerer, KeptAnswers, answer_questions
from mmlab.evaluate.questions import BlindAnswers, Question, read_picture
from mmlab.evaluate.scores.score import Scorer, Scores, show
from mmlab.report.cases import Case, cases_page
from mmlab.report.sheet import BAD, GOOD, contact_sheet


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


GRID_SIDE = 224


def draw_grid(
    index: ShardIndex,
    questions: Sequence[Question],
    predictions: Sequence[str],
    scores: Scores,
    blind: dict[str, Any] | None = None,
    cells: int = 24,
) -> Image.Image:
    """Draw questions spread evenly over the set, green where the answer is right, red where it is not wholly so.

    Args:
        index: the questions' shards.
        questions: all of them.
        predictions: an answer to each.
        scores: of these.
        blind: what one scores without looking, for the title.
        cells: questions that are drawn, about.
    """
    step = max(1, len(questions) // cells)
    chosen = range(0, len(questions), step)[:cells]
    spec = ImageSpec(GRID_SIDE)
    pictures = [read_picture(index, questions[n].sample, spec) for n in chosen]
    right = [scores.each[n] >= 1 for n in chosen]
    texts = [_text(questions[n], predictions[n], ok) for n, ok in zip(chosen, right, strict=True)]
    title = f"{show(scores.main, scores.all[scores.main])} of {len(questions):,} questions"
    if blind is not None:
        title += f" (blind: {show(scores.main, blind[scores.main])})"
    return contact_sheet(pictures, texts, columns=6, colours=[GOOD if ok else BAD for ok in right], title=title)


def _text(question: Question, prediction: str, right: bool) -> str:
    said = prediction or "(nothing)"
    return f"{question.text}\n{said}" if right else f"{question.text}\n{said} (right: {question.answer})"


PAGE_SIDE = 320


def worst(each: Sequence[float], count: int) -> list[int]:
    """The places of the lowest scores below 1, in order of score; of equals the ones that are cut are spread evenly."""
    found: list[int] = []
    for score in sorted({score for score in each if score < 1}):
        equal = [n for n, other in enumerate(each) if other == score]
        room = count - len(found)
        if room <= 0:
            break
        step = max(1.0, len(equal) / room)
        found += [equal[int(i * step)] for i in range(min(room, len(equal)))]
    return found


def worst_page(
    index: ShardIndex, questions: Sequence[Question], predictions: Sequence[str], scores: Scores, count: int = 48
) -> str:
    """The worst `count` answers as HTML: picture, question, what was said, what is right.

    Raises:
        DataError: a picture that cannot be read.
    """
    spec = ImageSpec(PAGE_SIDE)
    chosen = worst(scores.each, count)
    cases = [
        Case(
            read_picture(index, questions[n].sample, spec),
            f"{questions[n].key} · {', '.join(questions[n].reference.types)} · {scores.each[n]:.2f}",
            {
                **({"question": questions[n].text} if questions[n].text else {}),
                "said": predictions[n] or "(nothing)",
                "right": " · ".join(dict.fromkeys(questions[n].reference.answers)),
            },
        )
        for n in chosen
    ]
    missed = sum(score < 1 for score in scores.each)
    whole = f"{scores.main.replace('_', ' ')} {show(scores.main, scores.all[scores.main])}"
    return cases_page(f"{whole} of {len(questions):,} questions; {len(chosen)} of {missed:,} that lose a mark", cases)
