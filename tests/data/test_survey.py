"""What `mmlab init` counts in a set of shards."""

import io

from PIL import Image

from mmlab.data.survey import survey
from tests.tiny_shapes import make_records


def picture(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_texts_pictures_and_classes_are_counted(tmp_path):
    follow_ups = [{"question": "is it large?", "answer": "no"}]
    asked = {"question": "what color?", "answer": "dark red", "system": "be brief", "follow_ups": follow_ups}
    turns = ["hello", "what is it?", "a red circle"]
    chat = [{"from": side, "value": text} for side, text in zip(("gpt", "human", "gpt"), turns, strict=True)]
    records = [
        {"caption": "a red circle", "questions": [asked]},
        {"caption": "a red circle", "conversations": chat, "class": 0},
        {"captions": ["a text alone"]},
        {"class": "cat"},
        {"questions": "none"},
    ]
    pictures = [picture(40, 40), picture(40, 20), None, picture(8, 20), None]
    counts = survey(make_records(tmp_path / "train", records, pictures))
    assert (counts.samples, counts.pictures, counts.several, counts.side) == (5, 3, 1, 40)
    assert not counts.square
    assert (counts.captions, counts.caption_answers, counts.questions) == (2, 1, 3)
    assert counts.classes == 2 and counts.words == len({"a", "red", "circle", "what", "is", "it"})
