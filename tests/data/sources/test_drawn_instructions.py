import json
import re

import pytest

from mmlab.config.errors import ConfigError
from mmlab.data.formats import RESPONSE_TYPES
from mmlab.data.sources.drawn_instructions import instructions
from mmlab.evaluate.scores.scorers import says


def records(count: int = 120, **options) -> list[dict]:
    return [json.loads(json.dumps(members["json"])) for _, members in instructions(count, size=16, **options)]


def turns_of(record: dict) -> list[str]:
    turns = record["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    return [turn["value"] for turn in turns]


def test_types_alternate_and_a_sample_depends_only_on_its_number():
    nine = records(9)
    assert [record["type"] for record in nine] == [*RESPONSE_TYPES] * 3
    assert nine == records(30)[:9] and nine != records(9, seed=1) and nine != records(9, split="val")
    assert {record["id"] for record in nine}.isdisjoint(record["id"] for record in records(9, split="val"))


def test_the_types_share_their_images():
    pictures = [[members["png"] for _, members in instructions(5, [kind], size=16)] for kind in RESPONSE_TYPES]
    assert pictures[0] == pictures[1] == pictures[2]


def test_questions_are_the_dialogues_turns_with_their_facts():
    for record in records():
        texts = turns_of(record)
        assert texts[0].startswith("<image>\n") and "<image>" not in "".join(texts[1:])
        turns = [texts[0].removeprefix("<image>\n"), *texts[2::2]]
        assert [question["question"] for question in record["questions"]] == turns
        assert [question["answer"] for question in record["questions"]] == texts[1::2]
        for question in record["questions"]:
            assert question["type"] == record["type"]
            assert question["answers"] and all(says(question["answer"], fact) for fact in question["answers"])


def test_dialogues_agree_with_the_caption():
    for record in records():
        small, color, kind = re.fullmatch(r"an? (small )?(\w+) (\w+)", record["caption"]).groups()  # type: ignore[union-attr]
        size = "small" if small else "large"
        for question in record["questions"]:
            text, answer, facts = question["question"], question["answer"], question["answers"]
            if record["type"] == "detail_description":
                assert (
                    facts[:3] == [size, kind, color] and facts[3] in ("top", "bottom") and facts[4] in ("left", "right")
                )
            elif text.startswith("what color"):
                assert (text, answer) == (f"what color is the {kind}?", color)
            elif text.startswith("what shape"):
                assert (text, answer) == (f"what shape is the {color} object?", kind)
            elif text.startswith("is the object small"):
                assert answer == size
            elif text.startswith("is there"):
                assert answer == ("yes" if color in text.split() else "no")
            elif text.startswith("Can one"):
                assert facts == [color, f"The answer is {'no' if f'{color} wall' in text else 'yes'}"]
            elif text.startswith("Does"):
                assert facts == [kind, f"The answer is {'yes' if kind == 'circle' else 'no'}"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"types": ["conversations"]}, "Did you mean 'conversation'"),
        ({"types": []}, "types cannot be empty"),
        ({"kinds": ["cirkle"]}, "Did you mean 'circle'"),
        ({"count": 0}, "count >= 1"),
    ],
)
def test_wrong_options(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        list(instructions(**{"count": 1, **options}))
