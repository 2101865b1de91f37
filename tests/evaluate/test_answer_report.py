"""The grid of an evaluation's answers, and the page of the worst ones."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageColor

from mmlab.data.shard_files import ShardWriter
from mmlab.evaluate.answer_report import answer_scores, draw_grid, notes_of, worst, worst_page, write_predictions
from mmlab.evaluate.questions import read_questions
from mmlab.evaluate.scores.scorers import exact
from mmlab.report.contact_sheet import BAD, GOOD
from tests.tiny_files import png
from tests.tiny_shapes import make_records


def has(picture: Image.Image, color: str) -> bool:
    return bool((np.asarray(picture) == ImageColor.getrgb(color)).all(-1).any())


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    records = [{"questions": [{"question": f"number {i}?", "answer": str(i)}]} for i in range(9)]
    pictures = [png() if i else None for i in range(9)]
    return make_records(tmp_path_factory.mktemp("grid") / "test", records, pictures)


def grid(index, predictions, **options) -> Image.Image:
    questions = read_questions(index)
    scores, summary = answer_scores(exact, questions, predictions, questions)
    return draw_grid(index, questions, predictions, scores, summary, **options)


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


def test_the_sheet_shows_questions_of_all_types(tmp_path):
    """Of every n-th question, all could be of one type: the first one about each picture."""
    asked = [{"question": kind, "answer": kind, "type": kind} for kind in ("one", "two")]
    index = make_records(tmp_path / "two", [{"questions": asked}] * 12, [png()] * 12)
    assert has(sheet := grid(index, ["one", "?"] * 12, cells=12), GOOD) and has(sheet, BAD)


def test_all_pictures_of_a_question_are_shown(tmp_path):
    def picture(color: str) -> bytes:
        Image.new("RGB", (8, 8), color).save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    with ShardWriter(tmp_path / "pairs", quiet=True) as writer:
        record = {"questions": [{"question": "which?", "answer": "?"}]}
        writer.write("0", {"png": picture("#0102fe"), "0.png": picture("#03fd04"), "json": record})
    assert has(sheet := grid(writer.index, ["?"]), "#0102fe") and has(sheet, "#03fd04")


def test_the_sheet_has_a_table_of_a_few_types(tmp_path):
    def height(types: int) -> int:
        records = [{"questions": [{"question": f"{n}?", "answer": "1", "type": f"t{n}"}]} for n in range(types)]
        index = make_records(tmp_path / f"types{types}", records, [png()] * types)
        return grid(index, ["1"] * types, cells=1).height

    assert height(3) > height(1) and height(18) == height(15), "further ones are in scores.json"


def test_baselines_are_beside_the_scores(index, tmp_path):
    questions = read_questions(index)
    blind = {1: "1", 2: "?"}
    scores, summary = answer_scores(exact, questions, [str(i) for i in range(9)], questions, blind)
    assert (summary["blind"]["accuracy"], summary["blind"]["gain"], summary["question_only"]["accuracy"]) == (
        0.5,
        0.5,
        1,
    )
    assert notes_of(summary)[1] == (
        "blind and gain: 2 of 9 questions; 50.0% of the replies stay the same without the picture"
    )
    write_predictions(tmp_path, questions, ["1"] * 9, scores.each, blind)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row.get("blind") for row in rows[:4]] == [None, "1", "?", None]


def test_the_lowest_scores_come_first():
    assert worst([1, 0.3, 0, 0.9, 1, 0], 9) == [2, 5, 1, 3]
    assert worst([1, 0.3, 0, 0.9, 1, 0], 3) == [2, 5, 1]
    assert worst([0, 1] * 50, 5) == [0, 20, 40, 60, 80], "of equals they are spread over the set"
    assert worst([1.0, 1.0], 5) == []


def test_the_page(tmp_path):
    asked = [("what is <b>it</b>?", "red & blue"), ("how many?", "2"), ("is it?", "yes")]
    records = [{"questions": [{"question": q, "answer": a, "type": "t"}]} for q, a in asked]
    index = make_records(tmp_path / "shards", records, [png(), None, png()])
    questions = read_questions(index)
    predictions = ["<script>alert(1)</script>", "", "yes"]
    blind = {0: "red & blue", 2: "no"}
    scores, summary = answer_scores(exact, questions, predictions, blind=blind)
    page = worst_page(index, questions, predictions, scores, summary, blind)
    assert (
        "accuracy 33.33% of 3 questions (blind: 50.00%; constant: 33.33%; 3 distinct replies to 3 questions; 33.3% are "
        in page
    )
    assert "); 2 of 2 not entirely right" in page
    assert "<tr><td>t</td><td>3</td><td>33.33%</td><td>50.00%</td><td>33.33%</td><td>+0.00%</td></tr>" in page
    assert page.count("<dt>blind</dt>") == 1 and "<p>blind and gain: 2 of 3 questions; " in page
    assert page.count("<article") == 2 and "is it?" not in page
    assert "what is &lt;b&gt;it&lt;/b&gt;?" in page and "red &amp; blue" in page and "(nothing)" in page
    assert "<script" not in page and "http" not in page, "the page runs nothing and loads nothing"
    [data] = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (320, 320)
