"""Which source serves each position: a function of the position alone, with exact shares.

The sources are the leaves of a balanced binary tree. A node that has served n samples owes its left child
`n * left / whole`, rounded; whoever that count says is next, serves. So a position is found in a handful of
integer operations without a table, whatever the weights are: sizes of millions need no common divisor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np

from mmlab.config.errors import ConfigError


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
