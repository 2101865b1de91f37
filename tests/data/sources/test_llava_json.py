import json

import pytest

from mmlab.config.errors import DataError
from mmlab.data.config import Prompt
from mmlab.data.dialogues import REQUESTS, conversations_of
from mmlab.data.sources.llava_json import llava_json
from tests.tiny_builds import built
from tests.tiny_files import jpeg, png

TURNS = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]
SAID = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A cat."}]
MORE = [{"from": "human", "value": "Really?"}, {"from": "gpt", "value": "Yes."}]


@pytest.fixture
def make(tmp_path):
    (tmp_path / "images" / "00").mkdir(parents=True)
    (tmp_path / "images" / "00" / "a.jpg").write_bytes(png())  # a PNG in all but name
    (tmp_path / "images" / "7.jpg").write_bytes(jpeg())
    (tmp_path / "images" / "page.jpg").write_bytes(b"<html>404")

    def build(entries, **options):
        path = tmp_path / "chat.json"
        path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
        return built(llava_json(path, tmp_path / "images", **{"separate": True, **options}), tmp_path / "out")

    return build


def test_images_texts_and_repeated_ids(make):
    entries = [
        {"id": "GCC/01.x", "image": "00/a.jpg", "conversations": TURNS},
        {"id": "GCC/01.x", "image": "00/a.jpg", "conversations": TURNS + MORE},
        {"id": 7, "conversations": SAID, "model": "left out"},
        {"image": "00/a.jpg", "conversations": SAID},
    ]
    index, tally = make(entries)
    assert list(index.keys) == ["GCC_01_x", "GCC_01_x-1", "7", "3"]
    assert tally.rows == tally.written == 4
    assert tally.details == {
        **{"text_only": 1, "renamed": 1, "turns_skipped": 0, "system_messages": 0},
        **{"images_without_marker": 1, "records_joined": 0},
    }
    assert index.read(0)["png"] == png()
    assert json.loads(index.read(1)["json"]) == {"id": "GCC/01.x", "conversations": TURNS + MORE}
    assert index.extensions(2) == ["json"]


def test_the_response_type_comes_from_the_entry_or_the_option(make):
    entries = [{"id": "a", "conversations": SAID}, {"id": "b", "type": "detail_description", "conversations": SAID}]
    index, _ = make(entries, kind="conversation")
    assert [index.type_of(i) for i in range(2)] == ["conversation", "detail_description"]
    assert json.loads(index.read(0)["json"])["type"] == "conversation"
    index, _ = make(entries)
    assert [index.type_of(i) for i in range(2)] == ["", "detail_description"]


def test_missing_images_are_counted_within_the_budget(make):
    good = {"id": "a", "image": "00/a.jpg", "conversations": TURNS}
    entries = [good, {**good, "image": "00/b.jpg"}, {**good, "image": "page.jpg"}, {**good, "image": "../a.jpg"}]
    index, tally = make(entries, missing_budget=0.75)
    assert len(index) == 1 and tally.left_out == {"missing": 1, "unsupported": 1, "outside": 1}
    with pytest.raises(DataError, match=r"entry 2: image 'page\.jpg' is neither.*: 2, the missing budget allows 1"):
        make(entries, missing_budget=0.3)
    with pytest.raises(DataError, match=r"entry 1: image '00/b\.jpg' is not in"):
        make(entries)


def test_forms_of_an_image(make, tmp_path):
    here = str(tmp_path / "images" / "00" / "a.jpg")
    forms = ["00/a.jpg", ["00/a.jpg"], here, "./00/../00/a.jpg", 7, "7", None, "", []]
    entries = [{"image": image, "conversations": TURNS if image else SAID} for image in forms]
    index, tally = make(entries)
    stored = [set(index.extensions(i)) - {"json"} for i in range(9)]
    assert stored == [{"png"}] * 4 + [{"jpg"}] * 2 + [set()] * 3
    index, _ = make([{"images": ["7.jpg"], "conversations": TURNS}])
    assert index.read(0)["jpg"] == jpeg()
    several = [{"image": image, "conversations": TURNS} for image in (["7.jpg", "7.jpg"], {"path": "7.jpg"}, True)]
    _, tally = make([*entries, *several])
    assert tally.rows == 12 and tally.left_out == {"pictures": 1, "no-image": 2}


def test_several_images_of_records_are_joined_if_all_are_the_same(make):
    both = [{"from": "human", "value": "<image> Is it <image>?"}, {"from": "gpt", "value": "No."}]
    entries = [
        {"id": "a", "type": "pair", "image": ["00/a.jpg", "7.jpg"], "conversations": both},
        {"id": "b", "image": ["7.jpg", "00/a.jpg"], "conversations": both},
        {"id": "c", "image": ["./00/a.jpg", "7.jpg"], "conversations": both},
        {"id": "d", "image": ["00/../00/a.jpg", "7.jpg"], "conversations": SAID},
        {"id": "e", "type": "caption", "image": "7.jpg", "conversations": TURNS},
        {"id": "f", "image": ["7.jpg"] * 33, "conversations": SAID},
        {"id": "g", "image": ["7.jpg", "7.jpg"], "conversations": TURNS},
    ]
    index, tally = make(entries, separate=False, captions="from-first-answer", caption_types=["pair"])
    assert list(index.keys) == ["a", "b", "e"] and tally.left_out == {"pictures": 2}
    assert "It has 33 images; a sample holds at most 32." in tally.examples["pictures"]
    assert (tally.details["records_joined"], tally.details["several_images"], tally.details["captions"]) == (2, 2, 1)
    members = index.read(0)
    assert (members["png"], members["0.jpg"]) == (png(), jpeg()) and list(index.read(1)) == ["0.png", "jpg", "json"]
    record = json.loads(members["json"])
    assert [one["question"] for one in record["questions"]] == [both[0]["value"], both[0]["value"], "What is this?"]
    shown = [dialogue[0].text for dialogue in conversations_of(record, Prompt(), 0, 2)]
    assert shown == [both[0]["value"], both[0]["value"], "<image>\n<image>\nWhat is this?"]


def test_json_lines_under_any_name(make):
    lines = [json.dumps({"id": n, "conversations": SAID}) for n in range(3)]
    index, tally = make("\n".join([lines[0], "", lines[1], "{", lines[2]]))
    assert list(index.keys) == ["0", "1", "2"]
    assert tally.rows == 4 and "line 4: The line is not JSON" in tally.examples["json"]


def test_turns_are_checked_as_in_training(make):
    system, human, gpt = ({"from": role, "value": role} for role in ("system", "human", "gpt"))
    conversations = [
        [system, gpt, *TURNS, human],
        [human, human, gpt],
        [{"from": "user", "value": "q"}, gpt],
        [human, {"from": "gpt", "value": " "}],
        [human, {"from": "gpt"}],
        [gpt],
        [human],
        [],
        None,
        ["text"],
        [*TURNS, *TURNS],
        [human, {"from": "gpt", "value": "\ud83d"}],
    ]
    entries: list = [{"image": "7.jpg", "conversations": turns} for turns in conversations]
    index, tally = make([*entries, {"conversations": TURNS}, "text"])
    assert json.loads(index.read(0)["json"])["conversations"] == [system, *TURNS]
    assert (tally.rows, tally.written, tally.details["turns_skipped"]) == (14, 1, 2)
    assert tally.left_out == {
        **{"order": 1, "role": 1, "empty-answer": 2, "no-answer": 2, "turns": 4},
        **{"pictures": 1, "unicode": 1, "no-picture": 1},
    }


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{", "is not JSON"),
        ({"a": 1}, "neither a JSON list of entries nor JSON lines"),
        ({"images": [], "annotations": []}, "`mmlab shards build coco`"),
        ([], "no samples"),
        ([{"messages": []}], "Records with messages are read by `mmlab shards build messages`"),
        (["text"], "turns 1, such as .*entry 0: Expected an object"),
        ([{"conversations": [{"from": "gtp", "value": "x"}]}], "entry 0: A turn is from 'gtp'"),
        ([{"image": "../secret.png", "conversations": TURNS}], "points outside"),
        ([{"image": "/etc/passwd", "conversations": TURNS}], "points outside"),
    ],
)
def test_malformed_files_are_errors(make, tmp_path, entries, message):
    with pytest.raises(DataError, match=message):
        make(entries)
    assert not (tmp_path / "out").exists()


def test_missing_file_has_a_hint(tmp_path):
    (tmp_path / "chat.json").write_text("[]")
    with pytest.raises(DataError, match=r"Did you mean 'chat\.json'"):
        built(llava_json(tmp_path / "chatt.json", tmp_path), tmp_path / "out")
    with pytest.raises(DataError, match="there is no file xxx"):
        built(llava_json("x" * 5000, tmp_path), tmp_path / "out")
    with pytest.raises(DataError, match=r"is a folder; give a file, such as chat\.json in it"):
        built(llava_json(tmp_path, tmp_path), tmp_path / "out")


def record(index, i: int) -> dict:
    return json.loads(index.read(i)["json"])


def test_records_about_one_image_are_one_sample(make):
    system = {"from": "system", "value": "Be brief."}
    entries = [
        {"id": "a", "image": "7.jpg", "type": "count", "conversations": [system, *TURNS, *MORE]},
        {"id": "b", "image": "00/a.jpg", "type": "color", "conversations": TURNS},
        {"id": "c", "image": "./7.jpg", "type": "color", "conversations": SAID},
        {"id": "d", "image": 7, "conversations": [*SAID, {"from": "human", "value": "left out"}]},
        {"id": "e", "conversations": SAID},
        {"id": "f", "image": "7.jpg", "conversations": [{"from": "gpt", "value": "no question"}]},
    ]
    index, tally = make(entries, separate=False)
    assert list(index.keys) == ["a", "b", "d", "e"]
    assert record(index, 0) == {
        "id": "a",
        "questions": [
            {
                **{"id": "a", "type": "count", "system": "Be brief.", "question": "What is this?", "answer": "A cat."},
                "follow_ups": [{"question": "Really?", "answer": "Yes."}],
            },
            {"id": "c", "type": "color", "question": "What is this?", "answer": "A cat."},
        ],
    }
    assert record(index, 1) == {"id": "b", "type": "color", "conversations": TURNS}
    assert tally.counts() == {
        **{"rows": 6, "samples": 5, "no-answer": 1, "text_only": 1, "turns_skipped": 1, "system_messages": 1},
        **{"images_without_marker": 2, "records_joined": 1, "type count": 1, "type color": 2},
    }
    dialogues = conversations_of(record(index, 0), Prompt(), 0)
    assert [[turn.text for turn in one] for one in dialogues] == [
        ["<image>\nWhat is this?", "A cat.", "Really?", "Yes."],
        ["<image>\nWhat is this?", "A cat."],
    ]
    assert dialogues[0][0].system == "Be brief."


CAPTIONED = [
    {"image": "7.jpg", "type": "vqa", "conversations": TURNS},
    {"image": "7.jpg", "conversations": [{"from": "human", "value": "Describe the image.\n<image>"}, TURNS[1]]},
    {"image": "00/a.jpg", "type": "detail_description", "conversations": [SAID[0], MORE[1]]},
]


def test_captions_come_from_records_that_are_captions(make, tmp_path):
    index, tally = make(CAPTIONED, separate=False, captions="from-first-answer")
    assert [record(index, i)["caption"] for i in range(2)] == ["A cat.", "Yes."]
    assert tally.details["captions"] == 2 and len(record(index, 0)["questions"]) == 2
    index, tally = make(CAPTIONED, separate=False, captions="from-first-answer", caption_types=["vqa"])
    assert tally.details["captions"] == 2, "equal captions count once"
    with pytest.raises(DataError, match=r"no record that is a caption.*the types are vqa; name the type"):
        make(CAPTIONED[:1], captions="from-first-answer")
    (tmp_path / "t.csv").write_text("image,caption\n7.jpg,one\n./7.jpg,two\n")
    index, tally = make(CAPTIONED, separate=False, captions=str(tmp_path / "t.csv"))
    assert record(index, 0)["captions"] == ["one", "two"] and "caption" not in record(index, 1)
    assert (tally.details["captions"], tally.details["images_without_caption"]) == (2, 1)
    (tmp_path / "c.json").write_text(json.dumps(CAPTIONED))
    assert record(make(CAPTIONED, captions=str(tmp_path / "c.json"))[0], 2)["caption"] == "Yes."


@pytest.mark.parametrize(
    ("question", "asks"),
    [
        *((text, True) for texts in REQUESTS.values() for text in texts),
        *(
            (text, True)
            for text in ("Describe the picture", "Can you briefly describe this scene?", "", "Caption this.")
        ),
        ("Write a short caption for the image in one sentence.", True),
        ("Describe the color of the left circle.", False),
        ("What is in the picture?", False),
        ("Describe the image and count the circles.", False),
    ],
)
def test_requests_for_a_caption(make, question, asks):
    turns = [{"from": "human", "value": f"<image>\n{question}"}, TURNS[1]]
    entries = [{"image": "7.jpg", "type": "caption", "conversations": TURNS}]
    entries += [{"image": "00/a.jpg", "conversations": turns}]
    index, _ = make(entries, captions="from-first-answer")
    assert ("caption" in record(index, 1)) == asks


def test_an_image_without_a_question_joins_others(make):
    shown = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A gray cat."}]
    index, _ = make([{"image": "7.jpg", "conversations": turns} for turns in (shown, TURNS)], separate=False)
    texts = [[turn.text for turn in dialogue] for dialogue in conversations_of(record(index, 0), Prompt(), 0)]
    assert texts == [["<image>", "A gray cat."], ["<image>\nWhat is this?", "A cat."]]
