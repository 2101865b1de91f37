"""The page of the worst answers."""

import base64
import io
import re

from PIL import Image

from mmlab.evaluate.answer_report import worst, worst_page
from mmlab.evaluate.questions import read_questions
from mmlab.evaluate.scores.scorers import exact
from tests.tiny_files import png
from tests.tiny_shapes import make_records


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
    scores = exact(predictions, [question.reference for question in questions])
    page = worst_page(index, questions, predictions, scores)
    assert "accuracy 33.33% of 3 questions; 2 of 2 that lose a mark" in page
    assert page.count("<article") == 2 and "is it?" not in page
    assert "what is &lt;b&gt;it&lt;/b&gt;?" in page and "red &amp; blue" in page and "(nothing)" in page
    assert "<script" not in page and "http" not in page, "the page runs nothing and loads nothing"
    [data] = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (320, 320)
