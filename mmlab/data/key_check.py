"""Keys that are in two shards, found without holding all keys."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO

import numpy as np

from mmlab.config.errors import DataError
from mmlab.config.locations import Location
from mmlab.data.shard_table import ShardTable

AT_ONCE = 4_000_000
"""Hashes of keys that are sorted together: 32 MB."""


def check_keys(root: Location, names: Sequence[str], tables: Callable[[], Iterable[ShardTable]], samples: int) -> None:
    """Check that no key is in two shards.

    Args:
        root: of the set, for the error.
        names: of the shards.
        tables: opens the tables of the shards, one after the other.
        samples: how many there are in all.

    Raises:
        DataError: naming the first such key and its shards.
    """
    repeated = repeated_hashes((table.key_hashes for table in tables()), samples)
    if not len(repeated):
        return
    owner: dict[str, str] = {}
    for name, table in zip(names, tables(), strict=True):
        for j in np.flatnonzero(np.isin(table.key_hashes, repeated)).tolist():
            key = table.key(j)
            if key in owner:
                raise DataError(f"key '{key}' is in two shards of {root}: {owner[key]} and {name}.")
            owner[key] = name


def repeated_hashes(hashes: Iterable[np.ndarray], count: int) -> np.ndarray:
    """uint64: the values that occur more than once in arrays of `count` values in all, which are sorted part by part.

    Different keys with equal hashes are among them: of 130 million keys, with a probability of 0.05 %.
    """
    bits = max(0, int(np.ceil(np.log2(max(count, 1) / AT_ONCE))))
    found = [_repeated(part) for part in _parts(hashes, bits)]
    return np.concatenate(found)


def _parts(hashes: Iterable[np.ndarray], bits: int) -> Iterator[np.ndarray]:
    """The values by their first bits, through temporary files."""
    if not bits:
        yield np.concatenate([np.zeros(0, np.uint64), *hashes])
        return
    files: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(1 << bits)]  # noqa: SIM115
    try:
        for values in hashes:
            values = np.sort(values)
            ends = np.searchsorted(values >> np.uint64(64 - bits), np.arange(len(files)), side="right")
            for file, part in zip(files, np.split(values, ends[:-1]), strict=True):
                file.write(part.tobytes())
        for file in files:
            file.seek(0)
            yield np.frombuffer(file.read(), np.uint64)
    finally:
        for file in files:
            file.close()


def _repeated(values: np.ndarray) -> np.ndarray:
    values = np.sort(values)
    return np.unique(values[1:][values[1:] == values[:-1]])
