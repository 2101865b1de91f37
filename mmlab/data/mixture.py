"""Which source serves each position: a function of the position alone, with exact shares.

The sources are the leaves of a balanced binary tree. A node that has served n samples owes its left child
`n * left / whole`, rounded; whoever that count says is next, serves. So a position is found in a handful of
integer operations without a table, whatever the weights are: sizes of millions need no common divisor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cached_property
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np

from mmlab.config.errors import ConfigError, DataError, nearest
from mmlab.data.index import ShardIndex


@dataclass(frozen=True)
class _Node:
    """Sources `first … last - 1`; `left` and `whole` are the weights of the left child and of the node."""

    first: int
    last: int
    left: int
    whole: int

    def owed(self, served: int) -> int:
        """Samples of the left child among the node's first `served` ones: the share rounded half up."""
        return (2 * served * self.left + self.whole) // (2 * self.whole)


class Mixture:
    """An endless stream over several sources.

    After any number of positions, each source's count is within `depth / 2` of its share, where `depth` is
    log2 of the number of sources, rounded up (less than one sample for up to four sources); after every
    `sum(self.weights)` positions it is exact.

    Args:
        sizes: samples of each source.
        weights: share of each source, up to a common factor and to a millionth; None = in proportion to the
            sizes, so that `sum(sizes)` positions show each sample once.

    Raises:
        ConfigError: an empty source, a weight that is not above 0, or lengths that differ.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None):
        self.sizes = [int(size) for size in sizes]
        if not self.sizes or min(self.sizes) < 1:
            raise ConfigError(f"every source of a mixture needs samples, got sizes {self.sizes}.")
        self.weights = _integers(self.sizes if weights is None else weights)
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
        """Return (source, cursor): who serves this position, and how often it has served before.

        The cursor runs on over epochs: `divmod(cursor, size)` gives the source's epoch and its place in it.
        """
        first, last, served = 0, len(self.sizes), position
        while last - first > 1:
            node, middle = self._nodes[first, last], _middle(first, last)
            left = node.owed(served)
            if node.owed(served + 1) > left:
                last, served = middle, left
            else:
                first, served = middle, served - left
        return first, served


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


def _integers(weights: Sequence[float]) -> list[int]:
    """The weights as integers of the same proportions, so that no rounding ever accumulates."""
    fractions = []
    for weight in weights:
        if not 1e-6 <= weight < float("inf"):
            raise ConfigError(f"a source's weight must be a number of at least 1e-6, got {weight}.")
        # str() takes 0.1 for a tenth, and the limit takes 0.33333333 for a third.
        fractions.append(Fraction(str(weight)).limit_denominator(1_000_000))
    scale = lcm(*(f.denominator for f in fractions))
    return [int(f * scale) for f in fractions]


BALANCES = ("size", "type")


@dataclass(frozen=True)
class SourceConfig:
    """One folder of shards in a mixture.

    Attributes:
        path: the folder that holds the `.tar` files and their index.
        weight: share in the mixture; None for every source = in proportion to the sizes.
        name: what the data report calls it; the folder's name by default.
    """

    path: str
    weight: float | None = None
    name: str | None = None


@dataclass(frozen=True)
class Source:
    """A source whose index is open; with a `type` it has only the samples of that response type."""

    name: str
    index: ShardIndex
    weight: float | None = None
    type: str | None = None

    def __len__(self) -> int:
        return len(self.index) if self.type is None else len(self._numbers)

    @property
    def samples_per_shard(self) -> np.ndarray:
        """int64 `[S]`, of the shards that hold a sample of the source."""
        if self.type is None:
            return self.index.samples_per_shard
        ends = np.cumsum(self.index.samples_per_shard)
        counts = np.bincount(np.searchsorted(ends, self._numbers, side="right"), minlength=len(ends))
        return counts[counts > 0].astype(np.int64)

    def number(self, i: int) -> int:
        """The number in the index of the source's i-th sample."""
        return i if self.type is None else int(self._numbers[i])

    @cached_property
    def _numbers(self) -> np.ndarray:
        assert self.type is not None
        return np.flatnonzero(self.index.type_codes == self.index.type_names.index(self.type))


def open_sources(configs: Sequence[SourceConfig]) -> list[Source]:
    """Open the indexes of all sources.

    Raises:
        ConfigError: a path that is no folder, two sources of one name, or weights for some sources only.
        DataError: a missing or stale index, or one without samples.
    """
    sources: list[Source] = []
    for config in configs:
        path = Path(config.path)
        if path.suffix == ".tar":
            raise ConfigError(f"{path} is one shard; a source is the folder that holds the shards: {path.parent}.")
        name = config.name or path.resolve().name
        if any(name == source.name for source in sources):
            raise ConfigError(f"two sources are named '{name}'; give each its own `name`.")
        index = ShardIndex.open(path)
        if len(index) == 0:
            raise DataError(f"source '{name}' ({path}) holds no samples.")
        sources.append(Source(name, index, config.weight))
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        missing = sources[weighted.index(False)].name
        raise ConfigError(f"source '{missing}' has no weight while others have; weigh every source or none.")
    return sources


def by_type(sources: Sequence[Source]) -> list[Source]:
    """Part sources by response type, weighed so that each type has the same share of the mixture.

    Within a type, sources share in proportion to their samples of it. A part is named `<source>/<type>`.

    Raises:
        ConfigError: sources that have weights of their own.
        DataError: samples without a type.
    """
    if weighed := [source.name for source in sources if source.weight is not None]:
        raise ConfigError(
            f"data.balance=type weighs the response types, but source '{weighed[0]}' has a weight of its own; "
            "leave the weights out, or take data.balance=size."
        )
    parts: list[Source] = []
    for source in sources:
        codes = np.unique(source.index.type_codes).tolist()
        if any(not source.index.type_names[code] for code in codes):
            raise DataError(
                f"source '{source.name}' ({source.index.root}) has samples without a `type`, which data.balance=type "
                f"needs; if their records have one, renew the index: `mmlab shards index {source.index.root}`."
            )
        parts += [Source(f"{source.name}/{kind}", source.index, None, kind) for kind in source.index.type_names]
    sizes: dict[str, int] = {}
    for part in parts:
        assert part.type is not None
        sizes[part.type] = sizes.get(part.type, 0) + len(part)
    # Whole numbers, so that a third is a third whatever the sizes are.
    whole = lcm(*sizes.values())
    return [replace(part, weight=whole // sizes[part.type or ""] * len(part)) for part in parts]


def source_config(source: SourceConfig | Mapping[str, Any]) -> SourceConfig:
    """A source as its dataclass; raises ConfigError for an unknown field, or where there is no path."""
    if isinstance(source, SourceConfig):
        return source
    names = [field.name for field in fields(SourceConfig)]
    for name in source:
        if name not in names:
            raise ConfigError(f"a data source has no field '{name}'.{nearest(str(name), names)}")
    if "path" not in source:
        raise ConfigError(f"a data source needs a `path`: {dict(source)}.")
    return SourceConfig(**{str(name): value for name, value in source.items()})
