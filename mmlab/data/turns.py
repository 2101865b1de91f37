"""A dialogue, and the text that it becomes."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mmlab.config.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"
"""Marks a picture in a human turn, see `Turn.images`; anywhere else it is text."""


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: who.
        text: what.
        system: the first turn may have a system message before it.
        images: how many of the image markers in the text, from the first, stand for a picture; others are text.
    """

    role: Literal["human", "gpt"]
    text: str
    system: str | None = None
    images: int = 0

    @property
    def pieces(self) -> list[str]:
        """The text before, between and after the pictures."""
        return self.text.split(IMAGE, self.images) if self.images else [self.text]


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

    def show(self) -> None:
        """Write the marker of a picture."""
        self.images.append((len(self.text), len(self.text) + len(IMAGE)))
        self.text += IMAGE


def text_without_images(turn: Turn) -> str:
    """What a turn says beside its pictures."""
    return turn.text.replace(IMAGE, "", turn.images).strip() if turn.images else turn.text


def tokenizer_name(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The tokenizer's name in errors."""
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
