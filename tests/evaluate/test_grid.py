import numpy as np
import pytest
from PIL import Image, ImageColor

from mmlab.evaluate.answer_report import draw_grid
from mmlab.evaluate.questions import read_questions
from mmlab.evaluate.scores.scorers import exact
from mmlab.report.sheet import BAD, GOOD
from tests.tiny_files import png
from tests.tiny_shapes import make_records


def has(picture: Image.Image, colour: str) -> bool:
    return bool((np.asarray(picture) == ImageColor.getrgb(colour)).all(-1).any())


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    records = [{"questions": [{"question": f"number {i}?", "answer": str(i)}]} for i in range(9)]
    pictures = [png() if i else None for i in range(9)]
    return make_records(tmp_path_factory.mktemp("grid") / "test", records, pictures)


def grid(index, predictions, **options) -> Image.Image:
    questions = read_questions(index)
    references = [question.reference for question in questions]
    blind = exact(["0"] * len(questions), references).as_json()
    return draw_grid(index, questions, predictions, exact(predictions, references), blind, **options)


def test_right_is_green_and_wrong_is_red(index):
    right = [str(i) for i in range(9)]
    all_right, all_wrong = grid(index, right), grid(index, [""] * 9)
    assert has(all_right, GOOD) and not has(all_right, BAD)
    assert has(all_wrong, BAD) and not has(all_wrong, GOOD)
    mixed = grid(index, [*right[:8], "no"])
    assert has(mixed, GOOD) and has(mixed, BAD)


def test_a_long_list_is_thinned_evenly(index):
    right = [str(i) for i in range(9)]
    whole, thin = grid(index, right), grid(index, right, cells=3)
    assert whole.mode == "RGB" and thin.width < whole.width and thin.height < whole.height
