"""Pictures with their questions, answers and predictions."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from mmlab.data.index import ShardIndex
from mmlab.data.sample import ImageSpec
from mmlab.evaluate.questions import Question, read_picture
from mmlab.evaluate.scores import Scores, show
from mmlab.report.sheet import BAD, GOOD, contact_sheet

SIDE = 224


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
    spec = ImageSpec(SIDE)
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
