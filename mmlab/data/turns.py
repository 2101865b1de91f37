"""A dialogue, and the text that it becomes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"
"""Marks the picture where it opens the first human turn; anywhere else it is text."""


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: Literal["human", "gpt"]
    text: str


Dialogue = list[Turn]


@dataclass(frozen=True)
class Rendered:
    """A dialogue as text.

    Attributes:
        text: what is tokenised.
        spans: start and end of each learned stretch of characters, one per gpt turn.
        images: start and end of each picture marker.
    """

    text: str
    spans: list[tuple[int, int]]
    images: list[tuple[int, int]]


class Writer:
    """Text that grows by pieces and remembers where the marked ones lie."""

    def __init__(self):
        self.text = ""
        self.spans: list[tuple[int, int]] = []
        self.images: list[tuple[int, int]] = []

    def say(self, text: str) -> None:
        self.text += text

    def learn(self, text: str) -> None:
        self.spans.append((len(self.text), len(self.text) + len(text)))
        self.text += text

    def ask(self, text: str, picture: bool) -> None:
        if picture:
            self.images.append((len(self.text), len(self.text) + len(IMAGE)))
        self.text += text

    def done(self) -> Rendered:
        return Rendered(self.text, self.spans, self.images)


def shows_picture(dialogue: Sequence[Turn]) -> bool:
    """Whether the dialogue's first turn opens with the picture marker."""
    return bool(dialogue) and dialogue[0].role == "human" and dialogue[0].text.startswith(IMAGE)


def tokenizer_name(tokenizer: "PreTrainedTokenizerBase") -> str:
    """How an error calls the tokenizer."""
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
