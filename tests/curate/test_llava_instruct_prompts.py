"""Images in words, the questions that are drawn, and few-shot examples in the layout of LLaVA's."""

from pathlib import Path

import pytest

from mmlab.config.errors import ConfigError, DataError
from mmlab.curate.config import (
    CurateLLaVAInstructConfig,
    InstructDataConfig,
    InstructPromptsConfig,
    InstructSamplesConfig,
)
from mmlab.curate.llava_instruct_prompts import Example, context_of, draw_questions, load_examples, load_prompts
from mmlab.data.formats import RESPONSE_TYPES
from tests.tiny_shapes import make_records

BOX = {"category": "traffic light", "box": [0, 0.24156, 0.5, 1]}


@pytest.mark.parametrize(
    ("record", "context"),
    [
        (
            {"captions": ["A street. ", "", "Cars\nwait."], "boxes": [BOX, {**BOX, "box": [0.87, 0.1, 1.0, 0.9996]}]},
            "A street.\nCars wait.\n\ntraffic light: [0.0, 0.242, 0.5, 1.0]\ntraffic light: [0.87, 0.1, 1.0, 1.0]",
        ),
        ({"caption": "A street."}, "A street."),
        ({"caption": "left out", "captions": ["A street."]}, "A street."),
        ({"boxes": [BOX]}, "traffic light: [0.0, 0.242, 0.5, 1.0]"),
        ({"captions": [], "boxes": []}, ""),
        ({}, ""),
    ],
)
def test_a_context(record, context):
    assert context_of(record) == context


@pytest.mark.parametrize(
    "boxes",
    [
        "cat",
        [3],
        [{"category": "cat"}],
        [{"category": "", "box": [0, 0, 1, 1]}],
        [{"category": "cat", "box": [0, 0, 1]}],
        [{"category": "cat", "box": [0, 0, 640, 480]}],
        [{"category": "cat", "box": [0, 0, 1, float("nan")]}],
        [{"category": "cat", "box": [0, 0, 1, "1"]}],
    ],
)
def test_malformed_boxes(boxes):
    with pytest.raises(ValueError):
        context_of({"captions": ["A cat."], "boxes": boxes})


def test_the_draw(tmp_path):
    index = make_records(tmp_path / "p", [{"caption": f"{i}"} if i % 4 else {} for i in range(16)], [None] * 16)
    questions = draw_questions(index, dict.fromkeys(RESPONSE_TYPES, 100), 0)
    assert len(questions.rows) == 36 and questions.without_context == 4 and questions.contexts[5] == "5"
    assert [row["key"] for row in questions.rows[::12]] == [f"s0001-{kind}" for kind in RESPONSE_TYPES]
    assert questions.rows[1] == {"key": f"s0002-{RESPONSE_TYPES[0]}", "sample": 2, "type": RESPONSE_TYPES[0]}
    few = {"conversation": 3, "complex_reasoning": 5}
    by_seed = [draw_questions(index, few, seed).rows for seed in range(6)]
    assert all([row["type"] for row in rows].count("conversation") == 3 and len(rows) == 8 for rows in by_seed)
    assert by_seed[2] == draw_questions(index, few, 2).rows and len({str(rows) for rows in by_seed}) > 3
    three, four = ({row["key"] for row in draw_questions(index, {"conversation": n}, 1).rows} for n in (3, 4))
    assert three < four, "a larger draw contains the smaller one"
    two_types = [draw_questions(index, {"conversation": 3, "detail_description": 3}, seed).rows for seed in range(6)]
    assert any({row["sample"] for row in rows[:3]} != {row["sample"] for row in rows[3:]} for rows in two_types)


def test_malformed_records_are_named(tmp_path):
    with pytest.raises(DataError, match="contains neither captions nor boxes"):
        draw_questions(make_records(tmp_path / "none", [{}], [None]), {"conversation": 1}, 0)
    bad = make_records(tmp_path / "bad", [{"caption": "x"}, {"boxes": [{"category": "cat", "box": 5}]}], [None] * 2)
    with pytest.raises(DataError, match=r"sample 's0001' of .*bad is malformed: a box is not"):
        draw_questions(bad, {"conversation": 1}, 0)


PAIR = "Question:\nWhat?\n===\nAnswer:\nA cat."


@pytest.fixture
def folder(tmp_path) -> Path:
    for kind, reply in (("conversation", f"{PAIR}\n===\n{PAIR}"), ("detail_description", "A cat.")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "system_message.txt").write_text("Look.\n")
        for i in range(2):
            (tmp_path / kind / f"00{i}_caps.txt").write_text(f"Cat {i}.\n\ncat: [0.1, 0.2, 0.3, 0.4]\n")
            (tmp_path / kind / f"00{i}_conv.txt").write_text(reply)
    return tmp_path


def test_examples_are_sorted_by_name(folder):
    first, second = load_examples(folder, "conversation")
    assert first == Example("Cat 0.\n\ncat: [0.1, 0.2, 0.3, 0.4]", f"{PAIR}\n===\n{PAIR}")
    assert second.context.startswith("Cat 1.")
    assert load_examples(folder, "detail_description")[1].reply == "A cat."


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda place: (place / "001_conv.txt").unlink(),
            "001 in .*conversation is incomplete: 001_conv.txt is missing",
        ),
        (lambda place: (place / "000_caps.txt").unlink(), "000_caps.txt is missing"),
        (lambda place: (place / "000_caps.txt").write_text("\n"), "000_caps.txt is empty"),
        (
            lambda place: (place / "000_conv.txt").write_text("A cat."),
            r"000_conv.txt does not have the form of its type \(text without a label\)",
        ),
        (lambda place: (place / "000_conv.txt").write_bytes(b"\xff"), "line 1, is not UTF-8"),
        (lambda place: [path.unlink() for path in place.glob("0*")], "contains no example"),
        (lambda place: place.rename(place.with_name("conversations")), "Did you mean 'conversations'"),
    ],
)
def test_mistakes_are_one_sentence(folder, change, says):
    change(folder / "conversation")
    with pytest.raises(ConfigError, match=says):
        load_examples(folder, "conversation")


def config(**changes) -> CurateLLaVAInstructConfig:
    few = {"data": InstructDataConfig(path="x"), "requests": ["What is it?"], "samples": InstructSamplesConfig(1, 2, 0)}
    return CurateLLaVAInstructConfig(**{**few, "prompts": InstructPromptsConfig("Talk.", None, ""), **changes})


def test_prompts_of_the_types_with_samples(folder):
    prompts = load_prompts(config(examples=str(folder)))
    assert list(prompts) == ["conversation", "detail_description"]
    assert (prompts["conversation"].system, prompts["detail_description"].system) == ("Talk.", "Look.")
    assert len(prompts["conversation"].examples) == 2
    alone = load_prompts(config(samples=InstructSamplesConfig(1, 0, 0)))
    assert alone["conversation"].messages("A cat.") == [
        {"role": "system", "content": "Talk."},
        {"role": "user", "content": "A cat."},
    ]


def test_missing_prompts_are_named(folder):
    (folder / "detail_description" / "system_message.txt").unlink()
    with pytest.raises(ConfigError, match=r"there is no file .*system_message\.txt"):
        load_prompts(config(examples=str(folder)))
    with pytest.raises(ConfigError, match=r"prompts\.detail_description=null is read from a folder with examples"):
        load_prompts(config())
    with pytest.raises(ConfigError, match=r"prompts\.complex_reasoning is empty"):
        load_prompts(config(samples=InstructSamplesConfig(0, 0, 1)))
    with pytest.raises(ConfigError, match=r"No response type has samples; set, for example, samples\.conversation=…"):
        load_prompts(config(samples=InstructSamplesConfig(0, 0, 0)))
