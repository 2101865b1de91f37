import pytest

from mmlab.evaluate.scores.incoherence import breaks_off, faults_of, finished, incoherence, repeats


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red circle and a red star", False),
        ("a small red circle and a small red star", False),
        ("the the the", True),
        ("the the end", False),
        ("a star a star a star", True),
        ("a star, a star and a star", False),
        ("a red star, A RED STAR. a red star", True),
        ("a red star on the left a red star on the left", True),
        ("There is a dog. It runs. There is a dog.", True),
        ("There is a dog on the grass. There is a dog on the road.", False),
        ("There is a dog on the grass near the road, and there is a dog on the grass near the house.", True),
        ("A man stands in front of the entrance of a house. A car is parked in front of the garage.", False),
        ("There is a dog on the grass. There is a cat on the road.", False),
        ("there is a", False),
        ("", False),
    ],
)
def test_repeats(text, expected):
    assert repeats(text) == expected


@pytest.mark.parametrize(
    ("text", "caption", "sentence"),
    [
        ("a red circle", False, True),
        ("A red circle.", False, False),
        ('He says "no."', False, False),
        ("a red circle and a", True, True),
        ("a red circle,", True, True),
        ("It is what it stands on.", False, False),
        ("###", True, True),
        ("  ", True, True),
        ("The man is", True, True),
    ],
)
def test_breaks_off(text, caption, sentence):
    """As a caption, which needs no full stop, and as a text of sentences."""
    assert (breaks_off(text, sentences=False), breaks_off(text, sentences=True)) == (caption, sentence)


def test_finished():
    assert all(map(finished, ["Yes.", "Yes!", "(Yes?)", "Yes…", 'a "b".  ']))
    assert not any(map(finished, ["Yes", "Yes,", "e.g. this", ""]))


def test_shares_are_of_descriptions():
    found = [
        faults_of(*one, sentences=False) for one in (("a star", True), ("a a a", False), ("and the", True), ("x", True))
    ]
    assert found == [[], ["repeated", "fragment", "no_end"], ["fragment"], []]
    assert incoherence(found) == {
        "descriptions": 4,
        "incoherent": 0.5,
        "repeated": 0.25,
        "fragment": 0.5,
        "no_end": 0.25,
    }
