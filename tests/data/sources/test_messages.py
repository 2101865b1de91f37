import base64
import json

import pytest

from mmlab.config.errors import DataError
from mmlab.data.config import Prompt
from mmlab.data.dialogues import conversations_of
from mmlab.data.sample_types import SampleError
from mmlab.data.sources.messages import chat_of, messages
from tests.tiny_builds import built
from tests.tiny_files import jpeg, png

INLINE = f"data:image/png;base64,{base64.b64encode(png()).decode()}"


def say(role: str, *content):
    return {"role": role, "content": content[0] if isinstance(content[0], str) else list(content)}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def image(**fields) -> dict:
    return {"type": "image", **fields}


ANSWER = say("assistant", text("A cat."))
FORMS = [
    # TRL: parts without a name, the images beside them; or texts alone
    {"images": ["a.jpg"], "messages": [say("user", image(), text("What?")), ANSWER]},
    {"images": ["a.jpg"], "messages": [say("user", "What?"), say("assistant", "A cat.")]},
    {"images": ["a.jpg"], "prompt": [say("user", image(), text("What?"))], "completion": [ANSWER]},
    # LLaMA-Factory: markers in texts, either names of the fields
    {"images": ["a.jpg"], "messages": [say("user", "<image>What?"), say("assistant", "A cat.")]},
    {
        "images": ["a.jpg"],
        "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}],
    },
    # transformers
    {"messages": [say("user", image(path="a.jpg"), text("What?")), ANSWER]},
    {"messages": [say("user", image(image="a.jpg"), text("What?")), ANSWER]},
    {"messages": [say("user", text("What?"), image(url="a.jpg")), ANSWER]},
    {"messages": [say("user", image(base64=INLINE.partition(",")[2]), text("What?")), ANSWER]},
    # OpenAI
    {"messages": [say("user", text("What?"), {"type": "image_url", "image_url": {"url": INLINE}}), ANSWER]},
    {"messages": [say("user", {"type": "image_url", "image_url": INLINE}, text("What?")), ANSWER]},
    # columns of a table have every field in every part
    {"image": "a.jpg", "messages": [say("user", image(text=None), {**text("What?"), "image": None}), ANSWER]},
]


@pytest.fixture
def make(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "photos" / name).write_bytes(jpeg())

    def build(entries, **options):
        path = tmp_path / "photos" / "chat.jsonl"
        path.write_text("\n".join(map(json.dumps, entries)))
        return built(messages(path, **options), tmp_path / "out")

    return build


@pytest.mark.parametrize("entry", FORMS, ids=range(len(FORMS)))
def test_every_form_is_the_same_dialogue(make, tmp_path, entry):
    for line in (entry, json.loads(json.dumps(entry).replace("a.jpg", f"file://{tmp_path}/photos/a.jpg"))):
        index, tally = make([line])
        record = json.loads(index.read(0)["json"])
        (dialogue,) = conversations_of(record, Prompt(), 0)
        assert [turn.text for turn in dialogue] == ["<image>\nWhat?", "A cat."]
        assert index.read(0).get("jpg", index.read(0).get("png")) in (jpeg(), png()) and tally.written == 1


def test_system_types_and_images_that_are_shared(make):
    entries = [
        {
            "id": 5,
            "type": "vqa",
            "system": "Be brief.",
            "images": ["a.jpg"],
            "messages": [say("user", "What?"), ANSWER],
        },
        {"type": "vqa", "images": ["a.jpg"], "messages": [say("developer", "Hm."), say("user", "q"), ANSWER]},
        {"messages": [say("user", "no image"), say("assistant", "a")]},
    ]
    index, tally = make(entries)
    assert list(index.keys) == ["5", "2"] and tally.details["records_joined"] == 1
    record = json.loads(index.read(0)["json"])
    assert [(one["system"], one["answer"], one["type"]) for one in record["questions"]] == [
        ("Be brief.", "A cat.", "vqa"),
        ("Hm.", "A cat.", "vqa"),
    ]
    assert index.type_of(0) == "vqa"


SEVERAL = [
    {"images": ["a.jpg", "b.jpg"], "messages": [say("user", image(), text("or"), image(), text("?")), ANSWER]},
    {"images": ["b.jpg"], "messages": [say("user", image(path="a.jpg"), text("or"), image(), text("?")), ANSWER]},
    {"images": ["a.jpg"], "messages": [say("user", image(), text("or"), image(path="b.jpg"), text("?")), ANSWER]},
    {"messages": [say("user", image(path="a.jpg"), text("or"), image(url="b.jpg"), text("?")), ANSWER]},
    {"images": ["a.jpg", "b.jpg"], "messages": [say("user", "<image>\nor\n<image>\n?"), ANSWER]},
    {"images": ["a.jpg", "b.jpg"], "messages": [say("user", text("<image>\nor\n<image>\n?")), ANSWER]},
]


def test_several_images_are_in_the_order_of_their_markers(make, tmp_path):
    (tmp_path / "photos" / "b.jpg").write_bytes(png())
    for entry in SEVERAL:
        index, tally = make([entry], separate=True)
        assert index.extensions(0) == ["0.png", "jpg", "json"] and tally.details["several_images"] == 1
        assert index.read(0)["jpg"] == jpeg() and index.read(0)["0.png"] == png()
        (dialogue,) = conversations_of(json.loads(index.read(0)["json"]), Prompt(), 0, 2)
        assert (dialogue[0].text, dialogue[0].images) == ("<image>\nor\n<image>\n?", 2)
    later = [say("user", image(), text("q")), ANSWER, say("user", text("and"), image()), ANSWER]
    index, _ = make([{"images": ["a.jpg", "b.jpg"], "messages": later}])
    (dialogue,) = conversations_of(json.loads(index.read(0)["json"]), Prompt(), 0, 2)
    assert [turn.images for turn in dialogue] == [1, 0, 1, 0]
    assert chat_of({"images": ["a", "b", "a"], "messages": [say("user", "q"), ANSWER]}).images == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"images": ["a.jpg", "b.jpg"], "messages": [say("user", image(), text("q")), ANSWER]}, "pictures"),
        ({"images": ["a.jpg"] * 33, "messages": [say("user", text("q")), ANSWER]}, "pictures"),
        ({"images": ["a.jpg", "c.jpg"], "messages": [say("user", text("q")), ANSWER]}, "missing"),
        ({"images": ["a.jpg"], "messages": [say("user", image(), image(), text("q")), ANSWER]}, "no-picture"),
        ({"messages": [say("user", image(), text("q")), ANSWER]}, "no-picture"),
        ({"messages": [say("user", image(url="https://x.org/a.jpg")), ANSWER]}, "remote"),
        ({"messages": [say("user", image(url="data:image/png,x")), ANSWER]}, "no-image"),
        ({"messages": [say("user", image(base64="%%")), ANSWER]}, "unsupported"),
        ({"images": ["c.jpg"], "messages": [say("user", "q"), ANSWER]}, "missing"),
        ({"messages": [say("user", {"type": "video", "video": "a.mp4"}), ANSWER]}, "part"),
        ({"videos": ["a.mp4"], "messages": [say("user", "<video>q"), ANSWER]}, "part"),
        ({"messages": [say("user", "q"), say("tool", "1"), ANSWER]}, "role"),
        ({"messages": [say("user", "q"), {"role": "assistant", "content": None, "tool_calls": [1]}]}, "empty-answer"),
        ({"messages": [say("user", "q")]}, "no-answer"),
        ({"messages": [say("user", text("\ud83d")), ANSWER]}, "unicode"),
        ({"messages": "text"}, "turns"),
        ({"prompt": "text", "completion": "text"}, "turns"),
        ([], "turns"),
    ],
)
def test_what_cannot_be_used_is_named(make, entry, reason):
    usable = {"messages": [say("user", "q"), ANSWER]}
    index, tally = make([usable, entry], missing_budget=0.5)
    assert tally.left_out == {reason: 1} and len(index) == 1


def test_a_text_part_has_a_text():
    with pytest.raises(SampleError, match="text that is not text"):
        chat_of({"messages": [say("user", {"type": "text", "text": ["q"]})]})


def test_a_remote_image_counts_as_lost(make):
    entry = {"messages": [say("user", image(url="https://x.org/a.jpg")), ANSWER]}
    with pytest.raises(DataError, match=r"line 1: image 'https://x.org/a.jpg' is on the network; download it"):
        make([entry])
