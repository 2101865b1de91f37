"""One rule for looking up classes: their names, and positions only where no name is a number."""

from typing import Any

import pytest

from mmlab.class_names import class_index

WORDS = ["cat", "dog", "red fox"]


@pytest.mark.parametrize(
    ("name", "names", "index"),
    [
        ("red fox", WORDS, 2),
        ("2", WORDS, 2),
        (0, WORDS, 0),
        (" dog\n", WORDS, 1),
        (5, ["3", "5", "7"], 1),
        ("7", ["3", "5", "7"], 2),
        (1, ["0", "1", "2"], 1),
        (1, ["1st", "2nd"], 1),
        ("0.5", ["1.5", "0.5"], 1),
    ],
)
def test_names_are_found(name: Any, names: list[str], index: int):
    assert class_index(name, names) == index


@pytest.mark.parametrize(
    ("name", "names"),
    [
        (1, ["3", "5", "7"]),
        ("0", ["1", "2"]),
        (1, ["01", "02"]),
        (1, ["1.5", "0.5"]),
        (0, ["-1", "1"]),
        (0, ["cat", "7"]),
        ("fox", WORDS),
        (3, WORDS),
        (-1, WORDS),
        ("-1", WORDS),
        (1.0, WORDS),
        (True, WORDS),
        (None, WORDS),
        ("", WORDS),
        ("²", WORDS),
    ],
)
def test_what_is_no_class(name: Any, names: list[str]):
    with pytest.raises(ValueError, match=r"There is no class .*; the classes are"):
        class_index(name, names)
