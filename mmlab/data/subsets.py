"""Which shards and samples of a set a tool reads when it does not read all."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmlab.data.index import ShardIndex
from mmlab.keyed import draw

FEW = 4
"""Shards of a remote set from which samples are shown: the table of each one is fetched."""


def evenly_spaced(total: int, count: int) -> Sequence[int]:
    """`count` of the numbers below `total`, from the first to the last one; all if there are no more."""
    if count >= total:
        return range(total)
    return np.unique(np.linspace(0, total - 1, count).round().astype(int)).tolist()


def drawn(total: int, count: int, seed: int) -> Sequence[int]:
    """A number below `total` from each of `count` equal parts, drawn by `seed`; all if there are no more."""
    if count >= total:
        return range(total)
    edges = [n * total // count for n in range(count + 1)]
    return [low + int(draw(seed, f"{n}") * (edges[n + 1] - low)) for n, low in enumerate(edges[:-1])]


def shown(index: ShardIndex, count: int) -> list[int]:
    """Places of at most `count` samples that are spread over a set; of a remote one they are in `FEW` of its shards."""
    if isinstance(index.root, Path):
        return list(evenly_spaced(len(index), count))
    full = np.flatnonzero(index.samples_per_shard)
    shards = [int(full[n]) for n in evenly_spaced(len(full), min(count, FEW))]
    places: list[int] = []
    for n, shard in enumerate(shards):
        share = (n + 1) * count // len(shards) - n * count // len(shards)
        numbers = evenly_spaced(int(index.samples_per_shard[shard]), share)
        places += [index.first(shard) + j for j in numbers]
    return places
