"""One sample on its way from a shard to a batch."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class SampleError(Exception):
    """A sample that cannot be used; the reader replaces it and counts `reason`.

    Args:
        reason: short slug that the data report counts under, such as `pixels` or `checksum`.
        message: the sentence for a person.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class ImageSpec:
    """What the model expects of a picture.

    Attributes:
        size: side of the square picture in pixels.
        aspect: `pad` to a square with the mean colour, `crop` its centre, or `stretch`.
        tokens: places that one picture takes in the language model's sequence.
    """

    size: int
    aspect: str = "pad"
    tokens: int = 0


@dataclass
class Sample:
    """A decoded sample.

    Attributes:
        key: the sample's key in its shard.
        source: name of the mixture source that it came from.
        record: canonical record (`caption`, `conversations`, `questions`, …).
        image: uint8 `[3, H, W]`, already resized, or None for text alone.
        seed: function of (run seed, epoch, position); all per-sample randomness comes from it.
        members: the bytes of further members that the collate asks for, by extension.
        shards: hash of the index that it came from: a source of another split may have the same name and keys.
    """

    key: str
    source: str
    record: dict[str, Any]
    image: Tensor | None
    seed: int
    members: dict[str, bytes] = field(default_factory=dict)
    shards: str = ""
