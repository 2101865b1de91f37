"""Questions and answers as a language model is asked to write them, read strictly.

Question:           A block is a label and its text, blocks are parted by a line of equals signs, and questions and
what is asked       answers alternate. The published examples of LLaVA have this form.
===
Answer:
what is answered
"""

import re

from mmlab.data.turns import IMAGE

_PART = re.compile(r"^[ \t]*={3,}[ \t]*$", re.MULTILINE)
_LABEL = re.compile(r"[ \t]*(Question|Answer)[ \t]*:[ \t]*")
# However a model writes a label within a turn, there is one.
_LINE = re.compile(r"^[ \t*#]*(?:Question|Answer)[ \t]*\d*[ \t*]*:", re.MULTILINE | re.IGNORECASE)

Pairs = list[tuple[str, str]]
"""Questions with their answers."""


class Malformed(Exception):
    """A reply that is not of the form asked for.

    Args:
        reason: a few words that such replies are counted under.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def read_dialogue(text: str) -> Pairs:
    """The questions and answers of a reply; nothing of it is left out or guessed.

    Raises:
        Malformed: `text without a label`, `labels out of order`, `label within a turn` (a missing separator), `empty
            turn`, `question without an answer`, or `picture mark`.
    """
    blocks = _PART.split(_lines(text))
    # A separator before the first or after the last turn parts nothing.
    blocks = blocks[int(not blocks[0].strip()) : len(blocks) - int(not blocks[-1].strip())]
    turns = [_turn(block.strip(), ("Question", "Answer")[i % 2]) for i, block in enumerate(blocks)]
    if not turns:
        raise Malformed("empty turn")
    if len(turns) % 2:
        raise Malformed("question without an answer")
    return list(zip(turns[::2], turns[1::2], strict=True))


def read_description(text: str) -> str:
    """The one text of a reply.

    Raises:
        Malformed: `empty turn`, `labels in a description`, or `picture mark`.
    """
    text = _lines(text)
    if not text:
        raise Malformed("empty turn")
    if _LINE.search(text) or _PART.search(text):
        raise Malformed("labels in a description")
    return _unmarked(text)


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").strip()


def _turn(block: str, expected: str) -> str:
    label = _LABEL.match(block)
    if label is None:
        raise Malformed("text without a label" if block else "empty turn")
    if label[1] != expected:
        raise Malformed("labels out of order")
    text = block[label.end() :].strip()
    if _LINE.search(text):
        raise Malformed("label within a turn")
    if not text:
        raise Malformed("empty turn")
    return _unmarked(text)


def _unmarked(text: str) -> str:
    """Refuse what training would take for the picture's place."""
    if IMAGE in text:
        raise Malformed("picture mark")
    return text
