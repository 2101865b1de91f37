"""Few-shot examples in the layout in which LLaVA's are published."""

from pathlib import Path

import pytest

from mmlab.config.errors import ConfigError
from mmlab.curate.examples import Example, load_examples, system_message

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


def test_pairs_in_the_order_of_their_names(folder):
    first, second = load_examples(folder, "conversation")
    assert first == Example("Cat 0.\n\ncat: [0.1, 0.2, 0.3, 0.4]", f"{PAIR}\n===\n{PAIR}")
    assert second.context.startswith("Cat 1.") and system_message(folder, "conversation") == "Look."
    assert load_examples(folder, "detail_description")[1].reply == "A cat."


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda place: (place / "001_conv.txt").unlink(), "one half of example 001 alone: 001_conv.txt is missing"),
        (lambda place: (place / "000_caps.txt").unlink(), "000_caps.txt is missing"),
        (lambda place: (place / "000_caps.txt").write_text("\n"), "000_caps.txt is empty"),
        (
            lambda place: (place / "000_conv.txt").write_text("A cat."),
            r"000_conv.txt is not .* \(text without a label\)",
        ),
        (lambda place: (place / "000_conv.txt").write_bytes(b"\xff"), "cannot be read"),
        (lambda place: [path.unlink() for path in place.glob("0*")], "holds no example"),
        (lambda place: place.rename(place.with_name("conversations")), "Did you mean 'conversations'"),
    ],
)
def test_mistakes_are_one_sentence(folder, change, says):
    change(folder / "conversation")
    with pytest.raises(ConfigError, match=says):
        load_examples(folder, "conversation")


def test_a_prompt_that_is_not_there(folder):
    (folder / "conversation" / "system_message.txt").unlink()
    with pytest.raises(ConfigError, match=r"There is no file .*system_message\.txt"):
        system_message(folder, "conversation")
