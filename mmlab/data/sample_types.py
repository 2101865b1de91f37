"""One sample on its way from a shard to a batch. Loads without torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import TYPE_CHECKING, Any

from mmlab.data.aspects import Shape

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
        aspect: how it becomes square, see `ASPECTS`; or `anyres`, several squares.
        tokens: places that one square takes in the language model's sequence; 0: none, and the model takes only the
            first of a sample's pictures.
        grids: rows and columns of the tiles that `anyres` chooses from.
        reduce_jpegs: decode large JPEGs smaller, see `mmlab.data.jpeg.reduction`.
        buckets: in place of a square, the shapes of which an image takes the nearest, as `bucket_shapes` orders them.
    """

    size: int
    aspect: str = "pad"
    tokens: int = 0
    grids: tuple[tuple[int, int], ...] = ()
    reduce_jpegs: bool = False
    buckets: tuple[Shape, ...] = ()

    @property
    def most_tokens(self) -> int:
        """Places of the picture that takes the most of them."""
        if not self.grids:
            return self.tokens
        side = isqrt(self.tokens)
        return self.tokens + max(rows * side * (columns * side + 1) for rows, columns in self.grids)

    @property
    def most_tiles(self) -> int:
        """Squares of the picture that has the most of them."""
        return 1 + max((rows * columns for rows, columns in self.grids), default=0)

    @property
    def form(self) -> str:
        """Size, aspect and a reduction, as a record of latents or codes states them (`ENCODED_AS`)."""
        reduced = " data.reduce_jpegs=true" if self.reduce_jpegs else ""
        return f"data.size={self.size} data.aspect={self.aspect}{reduced}"


@dataclass(frozen=True)
class Picture:
    """A picture as the vision encoder reads it, and the places that it takes in the sequence.

    Attributes:
        tiles: uint8 `[K, 3, S, S]`; one square, or with `anyres` a base view and then a grid of tiles. In an aspect
            bucket `[1, 3, H, W]`.
        places: int64 `[M]`; for each place, in order, which of the `K * P` features it takes, or `NEWLINE`.
        columns: tiles beside each other in the grid.
    """

    tiles: "Tensor"
    places: "Tensor"
    columns: int = 1


NEWLINE = -1
"""A place that takes the feature at the end of a row of features."""


@dataclass
class Sample:
    """A decoded sample.

    Attributes:
        key: its key in its shard.
        source: name of the mixture source that it came from.
        record: canonical record (`caption`, `conversations`, `questions`, …).
        pictures: in the order in which the text names them; none for text alone.
        seed: function of (run seed, epoch, position); all per-sample randomness comes from it.
        members: bytes of further members that the collate reads, by extension.
        shards: hash of the index that it came from: a source of another split may have the same name and keys.
    """

    key: str
    source: str
    record: dict[str, Any]
    pictures: "Sequence[Picture]"
    seed: int
    members: dict[str, bytes] = field(default_factory=dict)
    shards: str = ""

    @property
    def image(self) -> "Tensor | None":
        """The first picture as one square, or in its bucket's shape, uint8 `[3, H, W]`."""
        return self.pictures[0].tiles[0] if self.pictures else None


@dataclass(frozen=True)
class Prepared:
    """What a collate made of one sample.

    Attributes:
        content: what the collate's `batch` takes.
        counters: for the data report.
    """

    content: Any
    counters: dict[str, int]
