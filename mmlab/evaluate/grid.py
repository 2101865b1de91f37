"""Pictures with their questions, answers and predictions."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from mmlab.data.index import ShardIndex
from mmlab.data.sample import ImageSpec
from mmlab.evaluate.exact_match import matches
from mmlab.evaluate.questions import Question, read_picture
from mmlab.report.sheet import BAD, GOOD, contact_sheet

SIDE = 224


def draw_grid(
    index: ShardIndex,
    questions: Sequence[Question],
    predictions: Sequence[str],
    scores: dict[str, Any],
    cells: int = 24,
) -> Image.Image:
    """Draw questions spread evenly over the set, green where the answer is right, red where it is wrong."""
    step = max(1, len(questions) // cells)
    chosen = range(0, len(questions), step)[:cells]
    spec = ImageSpec(SIDE)
    pictures = [read_picture(index, questions[n].sample, spec) for n in chosen]
    right = [matches(predictions[n], questions[n].answer) for n in chosen]
    texts = [_text(questions[n], predictions[n], ok) for n, ok in zip(chosen, right, strict=True)]
    title = f"{scores['accuracy']:.1%} of {scores['questions']:,} questions"
    if "blind" in scores:
        title += f" (blind: {scores['blind']['accuracy']:.1%})"
    return contact_sheet(pictures, texts, columns=6, colours=[GOOD if ok else BAD for ok in right], title=title)


def _text(question: Question, prediction: str, right: bool) -> str:
    said = prediction or "(nothing)"
    return f"{question.text}\n{said}" if right else f"{question.text}\n{said} (right: {question.answer})"
