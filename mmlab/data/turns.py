"""A dialogue, and the text that it becomes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mmlab.config.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"
"""Marks the image where it opens the first human turn; anywhere else it is text."""


@dataclass(frozen=True)
class Turn:
    """What one side says; the first turn may have a system message before it."""

    role: Literal["human", "gpt"]
    text: str
    system: str | None = None


Dialogue = list[Turn]


class NoSystem(ConfigError):
    """A template has no place for a system message."""

    def __init__(self):
        super().__init__("The prompt's template has no place for a system message; leave prompt.system out.")


@dataclass
class Rendered:
    """A dialogue as text, written piece by piece.

    Attributes:
        text: to be tokenized.
        spans: start and end of each learned span of characters, one per gpt turn.
        images: start and end of each image marker.
    """

    text: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)
    images: list[tuple[int, int]] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.text += text

    def learn(self, text: str) -> None:
        self.spans.append((len(self.text), len(self.text) + len(text)))
        self.text += text

    def ask(self, text: str, image: bool) -> None:
        """Write a question; with `image` it opens with the marker."""
        if image:
            self.images.append((len(self.text), len(self.text) + len(IMAGE)))
        self.text += text


def shows_image(dialogue: Sequence[Turn]) -> bool:
    """Whether the dialogue's first turn opens with the image marker."""
    return bool(dialogue) and dialogue[0].role == "human" and dialogue[0].text.startswith(IMAGE)


def tokenizer_name(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The tokenizer's name in errors."""
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
