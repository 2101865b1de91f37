"""The order of samples as a function: (seed, epoch, position) → sample.

Shards are permuted, then samples within blocks of K shards, so that reading stays almost sequential and there
is no buffer to save. Permutations are the sorting order of raw Philox words, which numpy promises never to change;
it makes no such promise for `Generator.permutation`.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence

import numpy as np

from mmlab.config.errors import ConfigError


def _digest(purpose: str, seed: int, *counters: int) -> bytes:
    """Sixteen bytes that depend on every argument; counters have a fixed width, so that they cannot be confused."""
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed={seed} must lie in 0 … 2**64 - 1.")
    packed = struct.pack(f"<{len(counters) + 1}Q", seed, *counters)
    return hashlib.blake2b(packed + purpose.encode(), digest_size=16).digest()


def sample_seed(seed: int, epoch: int, position: int, source: str) -> int:
    """Return the seed of all randomness of one sample, in 0 … 2**63 - 1 (it fits an int64 tensor).

    It depends only on the place in the order: ranks, workers, accumulation and resumes change nothing.
    """
    return int.from_bytes(_digest(f"sample/{source}", seed, epoch, position)[:8], "little") >> 1


def source_seed(seed: int, source: str) -> int:
    """Return the seed of one source's order, so that sources of equal size have different orders."""
    return int.from_bytes(_digest(f"source/{source}", seed)[:8], "little")


def replacement(seed: int, epoch: int, position: int, source: str, attempt: int, size: int) -> int:
    """Return the sample (0 … size - 1) that replaces this one on the given attempt."""
    word = int.from_bytes(_digest(f"replacement/{source}", seed, epoch, position, attempt), "little")
    return word % size


def keyed_seed(purpose: str, seed: int, *counters: int) -> int:
    """Return a seed of 128 bits that depends on every argument."""
    return int.from_bytes(_digest(purpose, seed, *counters), "little")


def permutation(n: int, purpose: str, seed: int, *counters: int) -> np.ndarray:
    """int64 `[n]`: a permutation that depends only on the arguments."""
    return np.argsort(np.random.Philox(key=keyed_seed(purpose, seed, *counters)).random_raw(n), kind="stable")


class EpochOrder:
    """The order of one source's samples in each epoch; every epoch shows each sample once.

    Args:
        samples_per_shard: number of samples in each shard; sample i is the i-th of all shards in sequence.
        seed: in 0 … 2**64 - 1.
        block_shards: samples are permuted within blocks of this many (permuted) shards.
        shuffle: False keeps the order of the shards.

    Raises:
        ConfigError: a seed out of range, or no samples.
    """

    def __init__(
        self,
        samples_per_shard: Sequence[int] | np.ndarray,
        seed: int,
        block_shards: int,
        shuffle: bool = True,
    ):
        self.counts = np.asarray(samples_per_shard, dtype=np.int64)
        self.size = int(self.counts.sum())
        if self.size == 0:
            raise ConfigError("an order needs at least one sample.")
        self.seed = seed
        self.block_shards = block_shards
        self.shuffle = shuffle
        self._first = np.cumsum(self.counts) - self.counts  # first sample of each shard
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None  # epoch, shards in order, ends of blocks
        self._block: tuple[int, int, np.ndarray] | None = None  # epoch, block, samples in order

    def sample(self, epoch: int, position: int) -> int:
        """Return the sample at `position` (0 … size - 1) of `epoch`; raises IndexError outside."""
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} of an epoch of {self.size} samples")
        if not self.shuffle:
            return position
        shards, ends = self._shards(epoch)
        block = int(np.searchsorted(ends, position, side="right"))
        start = int(ends[block - 1]) if block else 0
        return int(self._samples(epoch, block, shards)[position - start])

    def block(self, epoch: int, position: int) -> tuple[int, int]:
        """Return (epoch, number of the block) of a position; without shuffling, each shard is a block."""
        _, ends = self._shards(epoch)
        return epoch, int(np.searchsorted(ends, position, side="right"))

    def blocks(self, epoch: int, first: int = 0) -> Iterator[list[int]]:
        """Yield the shards of each block of an epoch, from block `first` on; those without samples are left out."""
        # Of another epoch they are computed anew: the present one stays in memory.
        shards = self._shards(epoch)[0] if self._epoch and self._epoch[0] == epoch else self._permuted(epoch)
        for start in range(first * self._per_block, len(shards), self._per_block):
            yield [s for s in shards[start : start + self._per_block].tolist() if self.counts[s]]

    @property
    def _per_block(self) -> int:
        return self.block_shards if self.shuffle else 1

    def _permuted(self, epoch: int) -> np.ndarray:
        n = len(self.counts)
        return permutation(n, "shards", self.seed, epoch) if self.shuffle else np.arange(n)

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            shards = self._permuted(epoch)
            starts = np.arange(0, len(shards), self._per_block)
            ends = np.cumsum(np.add.reduceat(self.counts[shards], starts))
            self._epoch = epoch, shards, ends
        return self._epoch[1], self._epoch[2]

    def _samples(self, epoch: int, block: int, shards: np.ndarray) -> np.ndarray:
        # Only the current block is in memory: positions rise within a process.
        if self._block is None or self._block[:2] != (epoch, block):
            members = shards[block * self.block_shards : (block + 1) * self.block_shards]
            samples = np.concatenate([self._first[s] + np.arange(int(self.counts[s])) for s in members])
            self._block = epoch, block, samples[permutation(len(samples), "block", self.seed, epoch, block)]
        return self._block[2]
