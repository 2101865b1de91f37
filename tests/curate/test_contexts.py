"""Pictures in words, and which are chosen for which type."""

import pytest

from mmlab.config.errors import DataError
from mmlab.curate.contexts import choose, context_of
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
def test_boxes_that_are_none(boxes):
    with pytest.raises(ValueError):
        context_of({"captions": ["A cat."], "boxes": boxes})


def test_the_draw(tmp_path):
    index = make_records(tmp_path / "p", [{"caption": f"{i}"} if i % 4 else {} for i in range(16)], [None] * 16)
    chosen = choose(index, dict.fromkeys(RESPONSE_TYPES, 100), 0)
    assert len(chosen.rows) == 36 and chosen.without_context == 4 and chosen.contexts[5] == "5"
    assert [row["key"] for row in chosen.rows[::12]] == [f"s0001-{kind}" for kind in RESPONSE_TYPES]
    assert chosen.rows[1] == {"key": f"s0002-{RESPONSE_TYPES[0]}", "sample": 2, "type": RESPONSE_TYPES[0]}
    few = {"conversation": 3, "complex_reasoning": 5}
    by_seed = [choose(index, few, seed).rows for seed in range(6)]
    assert all([row["type"] for row in rows].count("conversation") == 3 and len(rows) == 8 for rows in by_seed)
    assert by_seed[2] == choose(index, few, 2).rows and len({str(rows) for rows in by_seed}) > 3
    three, four = ({row["key"] for row in choose(index, {"conversation": n}, 1).rows} for n in (3, 4))
    assert three < four, "more samples are the same and others"
    alike = [choose(index, {"conversation": 3, "detail_description": 3}, seed).rows for seed in range(6)]
    assert any({row["sample"] for row in rows[:3]} != {row["sample"] for row in rows[3:]} for rows in alike)


def test_what_cannot_be_told_is_named(tmp_path):
    with pytest.raises(DataError, match="holds neither captions nor boxes"):
        choose(make_records(tmp_path / "none", [{}], [None]), {"conversation": 1}, 0)
    bad = make_records(tmp_path / "bad", [{"caption": "x"}, {"boxes": [{"category": "cat", "box": 5}]}], [None] * 2)
    with pytest.raises(DataError, match=r"sample 's0001' of .*bad cannot be told: a box is not"):
        choose(bad, {"conversation": 1}, 0)
