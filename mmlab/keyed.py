"""Randomness keyed by a sample's seed: the same draw in every worker, on every rank, after every restart."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from math import prod
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def draw(seed: int, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing but `seed` and what it is for."""
    digest = blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53  # a float64 holds 53 bits


def choose(options: Sequence[T], seed: int, purpose: str) -> T:
    """One of `options`, drawn by `seed`."""
    return options[int(draw(seed, purpose) * len(options))]


Seeds = Sequence[int] | Tensor
"""One integer per sample: a batch's `seeds`, taken modulo 2⁶⁴."""


def uniform(seeds: Seeds, purpose: str, shape: Sequence[int] = ()) -> Tensor:
    """Numbers in [0, 1), float64 `[B, *shape]` on the CPU; without a shape one per seed.

    Args:
        seeds: one integer per sample.
        purpose: what the numbers are for; another purpose gives independent numbers.
        shape: of one sample.
    """
    drawn = np.empty((len(seeds), prod(shape)))
    for row, stream in zip(drawn, _streams(seeds, purpose), strict=True):
        stream.random(out=row)
    return torch.from_numpy(drawn).view(len(seeds), *shape)


def normal(seeds: Seeds, shape: Sequence[int], purpose: str) -> Tensor:
    """Standard normal numbers, float32 `[B, *shape]` on the CPU.

    Args:
        seeds: one integer per sample.
        shape: of one sample.
        purpose: what the numbers are for; another purpose gives independent numbers.
    """
    drawn = np.empty((len(seeds), prod(shape)), dtype=np.float32)
    for row, stream in zip(drawn, _streams(seeds, purpose), strict=True):
        stream.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(drawn).view(len(seeds), *shape)


def _streams(seeds: Seeds, purpose: str) -> Iterator[np.random.Generator]:
    """The stream of each seed; valid until the next one is taken."""
    domain = int.from_bytes(blake2b(purpose.encode(), digest_size=8).digest(), "little")
    philox = np.random.Philox(key=[0, domain])
    stream, state = np.random.Generator(philox), philox.state
    for seed in seeds.tolist() if isinstance(seeds, Tensor) else seeds:
        # Resetting one generator costs a tenth of constructing another.
        state["state"]["key"] = np.array([seed % 2**64, domain], dtype=np.uint64)
        philox.state = state
        yield stream
