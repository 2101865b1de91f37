"""Which source serves each position: a function of the position alone, with exact shares.

The sources are the leaves of a balanced binary tree. Of a node's first n samples, its left child serves
`n * left / whole`, rounded; where that count rises, the left child is next, otherwise the right one. A position is thus
found in a few integer operations without a table, for any weights: sizes in the millions need no common divisor.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import lcm

import numpy as np

from mmlab.config.errors import ConfigError, DataError
from mmlab.config.locations import Url
from mmlab.data.config import ShardsConfig, SourceConfig
from mmlab.data.index import ShardIndex
from mmlab.data.set_buckets import Bucket


@dataclass(frozen=True)
class _Node:
    """Sources `first … last - 1`; `left` and `whole` are the weights of the left child and of the node."""

    first: int
    last: int
    left: int
    whole: int

    def from_left(self, served: int) -> int:
        """Samples of the left child among the node's first `served` ones: its share, rounded half up."""
        return (2 * served * self.left + self.whole) // (2 * self.whole)


class Mixture:
    """An endless stream over several sources.

    After any number of positions, each source's count is within `depth / 2` of its share, where `depth` is
    log2 of the number of sources, rounded up (less than one sample for up to four sources); after every
    `sum(self.weights)` positions it is exact.

    Args:
        sizes: samples of each source.
        weights: share of each source, up to a common factor and to a millionth; None: in proportion to the
            sizes, so that `sum(sizes)` positions show each sample once.

    Raises:
        ConfigError: an empty source, a weight that is not above 0, or lengths that differ.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None):
        self.sizes = [int(size) for size in sizes]
        if not self.sizes or min(self.sizes) < 1:
            raise ConfigError(f"every source of a mixture needs samples; the sizes are {self.sizes}.")
        self.weights = integers(self.sizes if weights is None else weights)
        if len(self.weights) != len(self.sizes):
            raise ConfigError(f"{len(self.weights)} weights for {len(self.sizes)} sources.")
        self._nodes: dict[tuple[int, int], _Node] = {}
        self._grow(0, len(self.sizes))

    def _grow(self, first: int, last: int) -> None:
        if last - first < 2:
            return
        middle = _middle(first, last)
        self._nodes[first, last] = _Node(first, last, sum(self.weights[first:middle]), sum(self.weights[first:last]))
        self._grow(first, middle)
        self._grow(middle, last)

    def at(self, position: int) -> tuple[int, int]:
        """Return (source, cursor): which source serves this position, and how often it has served before.

        The cursor continues over epochs: `divmod(cursor, size)` is the source's epoch and the place in it.
        """
        first, last, served = 0, len(self.sizes), position
        while last - first > 1:
            node, middle = self._nodes[first, last], _middle(first, last)
            left = node.from_left(served)
            if node.from_left(served + 1) > left:
                last, served = middle, left
            else:
                first, served = middle, served - left
        return first, served

    def served(self, position: int) -> list[int]:
        """Return how often each source has served before a position."""
        counts, open_nodes = [0] * len(self.sizes), [(0, len(self.sizes), position)]
        while open_nodes:
            first, last, served = open_nodes.pop()
            if last - first < 2:
                counts[first] = served
                continue
            left, middle = self._nodes[first, last].from_left(served), _middle(first, last)
            open_nodes += (first, middle, left), (middle, last, served - left)
        return counts


class Sequential:
    """Every sample of every source once, source after source (validation)."""

    def __init__(self, sizes: Sequence[int]):
        self.sizes = [int(size) for size in sizes]
        self._ends = np.cumsum(self.sizes)

    def at(self, position: int) -> tuple[int, int]:
        """Return (source, cursor) as `Mixture.at` does; raises IndexError past the last sample."""
        source = int(np.searchsorted(self._ends, position, side="right"))
        if source == len(self.sizes):
            raise IndexError(f"position {position} of {self._ends[-1]} samples")
        return source, position - int(self._ends[source]) + self.sizes[source]


def _middle(first: int, last: int) -> int:
    return (first + last + 1) // 2


def integers(weights: Sequence[float]) -> list[int]:
    """The weights as integers in the same proportions, so that rounding never accumulates."""
    fractions = []
    for weight in weights:
        if not 1e-6 <= weight < float("inf"):
            raise ConfigError(f"a source's weight must be a number of at least 1e-6, not {weight}.")
        # str() makes 0.1 a tenth, and the limit makes 0.33333333 a third.
        fractions.append(Fraction(str(weight)).limit_denominator(1_000_000))
    scale = lcm(*(f.denominator for f in fractions))
    return [int(f * scale) for f in fractions]


@dataclass(frozen=True)
class Source:
    """An open source; with a `type`, only the samples of that response type, with a `bucket`, its images."""

    name: str
    index: ShardIndex
    weight: float | None = None
    type: str | None = None
    caption: str | None = None
    bucket: Bucket | None = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def stream(self) -> str:
        """The name that keys what is drawn for its samples: buckets of one source draw different numbers."""
        return self.name if self.bucket is None else f"{self.name}/{self.bucket.name}"

    @property
    def fetched(self) -> bool:
        """Whether shards in a store are fetched as a whole for it."""
        return isinstance(self.index.root, Url) and not (self.bucket is not None and self.bucket.sparse)

    @cached_property
    def shards(self) -> np.ndarray:
        """int64 `[S]`: the shards that hold a sample of the source; of a bucket all, so that buckets keep together."""
        return np.flatnonzero(self._counts) if self.type is not None else np.arange(len(self.index.shards))

    @cached_property
    def samples_per_shard(self) -> np.ndarray:
        """int64 `[S]`, over the shards that hold a sample of the source."""
        return self._counts[self.shards]

    def number(self, i: int) -> int:
        """The number in the index of the source's i-th sample."""
        if self.type is None and self.bucket is None:
            return i
        s = int(np.searchsorted(self._ends, i, side="right"))
        shard, rank = int(self.shards[s]), i - int(self._ends[s] - self.samples_per_shard[s])
        if self.bucket is not None:
            return self.index.first(shard) + int(self.bucket.samples(shard)[rank])
        return self.index.first(shard) + int(self.index.of_type(shard, self.type or "")[rank])

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.samples_per_shard)

    @cached_property
    def _counts(self) -> np.ndarray:
        """int64: the source's samples in each shard of the index."""
        if self.bucket is not None:
            return self.bucket.counts
        if self.type is None:
            return self.index.samples_per_shard
        return np.array([(entry.types or {}).get(self.type, 0) for entry in self.index.manifest.entries], np.int64)


def open_sources(config: ShardsConfig, listed: Sequence[SourceConfig]) -> list[Source]:
    """Open the indexes of sources.

    Args:
        config: settings of the data.
        listed: its training or its validation sources.

    Raises:
        ConfigError: a shard in place of its folder, or two sources of one name.
        DataError: a missing or stale index, or one without samples.
    """
    sources: list[Source] = []
    for source in listed:
        path = config.folder(source)
        if path.suffix == ".tar":
            raise ConfigError(f"{path} is one shard; a source is the folder that holds the shards: {path.parent}.")
        name = source.name or path.resolve().name
        if any(name == other.name for other in sources):
            raise ConfigError(f"two sources are named '{name}'; give each its own `name`.")
        index = ShardIndex.open(path, config.cache)
        if len(index) == 0:
            raise DataError(f"source '{name}' ({path}) holds no samples.")
        sources.append(Source(name, index, source.weight, caption=source.caption))
    return sources


def by_type(sources: Sequence[Source]) -> list[Source]:
    """Split sources by response type, weighted so that each type has the same share of the mixture.

    Within a type, each source's share is in proportion to its samples of it. A part is named `<source>/<type>`.

    Raises:
        DataError: samples without a type.
    """
    parts: list[Source] = []
    for source in sources:
        if "" in source.index.type_names:
            raise DataError(
                f"source '{source.name}' ({source.index.root}) has samples without a `type`, which data.balance=type "
                "needs; if their records have one, build the shards with --separate, or rebuild the index: `mmlab "
                f"shards index {source.index.root}`."
            )
        parts += [
            replace(source, name=f"{source.name}/{kind}", weight=None, type=kind) for kind in source.index.type_names
        ]
    sizes: Counter[str | None] = Counter()
    for part in parts:
        sizes[part.type] += len(part)
    # Whole numbers, so that a third is exactly a third for any sizes.
    whole = lcm(*sizes.values())
    return [replace(part, weight=whole // sizes[part.type] * len(part)) for part in parts]
