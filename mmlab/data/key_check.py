"""Keys that are in two shards, found without holding all keys."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mmlab.config.errors import DataError
from mmlab.config.locations import Location
from mmlab.data.shard_table import ShardTable
from mmlab.runs.disk import writing

AT_ONCE = 4_000_000
"""Hashes of keys that are sorted together: 32 MB."""
_MOST_BITS = 8  # 256 temporary files
_LOOKED_UP = 10_000  # keys that are held to find equal ones


def check_keys(
    root: Location,
    names: Sequence[str],
    hashes: Callable[[], Iterable[np.ndarray]],
    table: Callable[[int], ShardTable],
    samples: int,
) -> None:
    """Check that no key is in two shards.

    Args:
        root: of the set, for the error.
        names: of the shards.
        hashes: of the keys of each shard, one shard after the other; called again if some occur twice.
        table: opens the table of a shard by its number.
        samples: how many there are in all.

    Raises:
        DataError: naming such a key and its shards.
        RunError: the temporary files do not fit on the disk.
    """
    for repeated in repeated_hashes(hashes(), samples):
        owner: dict[str, int] = {}
        for shard, values in enumerate(hashes()):
            there = np.flatnonzero(np.isin(values, repeated, kind="sort")).tolist()
            keys = [one.key(j) for one in [table(shard)] for j in there] if there else []
            for key in keys:
                if owner.setdefault(key, shard) != shard:
                    raise DataError(f"key '{key}' is in two shards of {root}: {names[owner[key]]} and {names[shard]}.")


def repeated_hashes(hashes: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yield the values that occur more than once, some at a time.

    Different keys with equal hashes are among them: of 130 million keys, with a probability of 0.05 %.

    Args:
        hashes: uint64 arrays.
        count: of their values in all, of which `AT_ONCE` are in memory.
    """
    bits = min(max(0, int(np.ceil(np.log2(max(count, 1) / AT_ONCE)))), _MOST_BITS)
    for values in _parts(hashes, bits):
        values = np.sort(values)
        repeated = np.unique(values[1:][values[1:] == values[:-1]])
        for start in range(0, len(repeated), _LOOKED_UP):
            yield repeated[start : start + _LOOKED_UP]


def _parts(hashes: Iterable[np.ndarray], bits: int) -> Iterator[np.ndarray]:
    """The values by their first bits, through temporary files."""
    if not bits:
        yield np.concatenate([np.zeros(0, np.uint64), *hashes])
        return
    with ExitStack() as stack:
        with writing(Path(tempfile.gettempdir())):
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1 << bits)]
            for values in hashes:
                values = np.sort(values)
                ends = np.searchsorted(values >> np.uint64(64 - bits), np.arange(len(files)), side="right")
                for file, part in zip(files, np.split(values, ends[:-1]), strict=True):
                    file.write(part.tobytes())
        for file in files:
            file.seek(0)
            yield np.frombuffer(file.read(), np.uint64)
            file.close()
