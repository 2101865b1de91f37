"""Which images of a set of shards belong to which aspect bucket, from the sizes in its index. S shards, B buckets."""

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np

from mmlab.config.errors import RunError
from mmlab.config.locations import Url, user_cache
from mmlab.data.aspects import Shape, bucket_of, cropped, shape_name
from mmlab.data.counters import CROPPED
from mmlab.data.formats import SIDE_CAP
from mmlab.data.index import ShardIndex
from mmlab.data.progress_bar import progress
from mmlab.runs.disk import replacing

_MANY = 1000  # shards of a folder whose tables take seconds to read
_KEPT = 64  # shards whose buckets are kept: of some blocks
SPARSE = 4
"""A bucket with less than an average bucket's images, divided by this, reads them one by one from a store."""


@dataclass(frozen=True)
class SetBuckets:
    """The buckets of all images of a set.

    Attributes:
        index: of the set.
        shapes: of the buckets.
        counts: int64 `[S, B]`: images of each shard in each bucket.
    """

    index: ShardIndex
    shapes: tuple[Shape, ...]
    counts: np.ndarray = field(repr=False)
    _kept: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, index: ShardIndex, shapes: tuple[Shape, ...]) -> "SetBuckets":
        """Count the images of a set; only sizes in the tables of its shards are read."""
        path = _counts_file(index, shapes)
        counts = None if path is None else _known(path, (len(index.shards), len(shapes)))
        if counts is None:
            shards = range(len(index.shards))
            shown = shards if path is None else progress(shards, "reading sizes of images", len(shards))
            rows = [np.bincount(_numbers(index, shard, shapes), minlength=len(shapes)) for shard in shown]
            counts = np.array(rows, np.int64)
            if path is not None:
                _keep(path, counts)
        return cls(index, shapes, counts)

    def numbers(self, shard: int) -> np.ndarray:
        """The bucket of each image of a shard."""
        numbers = self._kept.get(shard)
        if numbers is None:
            numbers = self._kept[shard] = _numbers(self.index, shard, self.shapes)
            while len(self._kept) > _KEPT:
                self._kept.pop(next(iter(self._kept)))
        return numbers


@dataclass(frozen=True)
class Bucket:
    """One bucket of a set."""

    whole: SetBuckets
    number: int

    @property
    def shape(self) -> Shape:
        return self.whole.shapes[self.number]

    @property
    def name(self) -> str:
        return shape_name(self.shape)

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 `[S]`: its images in each shard."""
        return np.ascontiguousarray(self.whole.counts[:, self.number])

    @property
    def sparse(self) -> bool:
        """Whether its images are few among those of their shards, so that whole shards are not fetched for them."""
        return int(self.counts.sum()) * SPARSE * len(self.whole.shapes) < int(self.whole.counts.sum())

    def samples(self, shard: int) -> np.ndarray:
        """int64: the numbers, within a shard, of its images."""
        return np.flatnonzero(self.whole.numbers(shard) == self.number)

    def counters(self, sample: int) -> dict[str, int]:
        """What the data report counts of a sample of the index, whose image can be read."""
        index = self.whole.index
        shard, j = index.place(sample)
        width, height = index.table(shard).image_sizes[j].tolist()
        share = cropped(width, height, self.shape) if width and height else 0.0
        return {f"bucket/{self.name}": 1, f"{CROPPED}/{self.name}": round(share * 1e6)}


def _numbers(index: ShardIndex, shard: int, shapes: tuple[Shape, ...]) -> np.ndarray:
    """uint8: the bucket of each image of a shard; of a sample without one, the square."""
    width, height = index.table(shard).image_sizes.astype(np.int64).clip(0, SIDE_CAP).T
    return bucket_of(width, height, shapes).astype(np.uint8)


def _counts_file(index: ShardIndex, shapes: tuple[Shape, ...]) -> Path | None:
    """Where the counts of a set are kept whose tables take long to read; None for a folder of few shards."""
    if not isinstance(index.root, Url) and len(index.shards) < _MANY:
        return None
    return user_cache("aspect_buckets") / f"{sha256(f'{index.hash} {shapes}'.encode()).hexdigest()}.npy"


def _known(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Counts that were kept; None if there are none that can be read."""
    try:
        counts = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return counts if counts.shape == shape and counts.dtype == np.int64 else None


def _keep(path: Path, counts: np.ndarray) -> None:
    """Keep counts for the next process; where that is not possible, it counts again."""
    try:
        with replacing(path) as draft, draft.open("wb") as file:
            np.save(file, counts)
    except (OSError, RunError):
        return
