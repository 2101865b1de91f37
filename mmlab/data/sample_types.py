"""One sample on its way from a shard to a batch. Loads without torch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class SampleError(Exception):
    """A sample that cannot be used; the reader replaces it and counts `reason`.

    Args:
        reason: short name that the data report counts under, such as `pixels` or `checksum`.
        message: one sentence for the user.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class ImageSpec:
    """The images that a model takes.

    Attributes:
        size: side of the square image in pixels.
        aspect: how it becomes square, see `ASPECTS`.
        tokens: places that one image takes in the language model's sequence.
    """

    size: int
    aspect: str = "pad"
    tokens: int = 0

    @property
    def form(self) -> str:
        """Size and aspect, as a record of latents or codes states them (`ENCODED_AS`)."""
        return f"data.size={self.size} data.aspect={self.aspect}"


@dataclass
class Sample:
    """A decoded sample.

    Attributes:
        key: its key in its shard.
        source: name of the mixture source that it came from.
        record: canonical record (`caption`, `conversations`, `questions`, …).
        image: uint8 `[3, H, W]`, already resized, or None for text alone.
        seed: function of (run seed, epoch, position); all per-sample randomness comes from it.
        members: bytes of further members that the collate reads, by extension.
        shards: hash of the index that it came from: a source of another split may have the same name and keys.
    """

    key: str
    source: str
    record: dict[str, Any]
    image: "Tensor | None"
    seed: int
    members: dict[str, bytes] = field(default_factory=dict)
    shards: str = ""


@dataclass(frozen=True)
class Prepared:
    """What a collate made of one sample.

    Attributes:
        content: what the collate's `batch` takes.
        counters: for the data report.
    """

    content: Any
    counters: dict[str, int]
