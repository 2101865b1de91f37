"""Randomness keyed by a sample's seed: the same numbers in every worker, on every rank, after every restart."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from math import prod
from random import Random
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

Seeds: TypeAlias = "Sequence[int] | Tensor"
"""One integer per sample: a batch's `seeds`, taken modulo 2⁶⁴."""


def draw(seed: int, purpose: str) -> float:
    """A number in [0, 1) that depends only on `seed` and `purpose`."""
    digest = blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53  # a float64 holds 53 bits


def choose(options: Sequence[T], seed: int, purpose: str) -> T:
    """One of `options`, drawn by `seed`."""
    return options[int(draw(seed, purpose) * len(options))]


def stream(seed: int, purpose: str) -> Random:
    """Python's generator for draws of any number and kind; it depends only on `seed` and `purpose`."""
    return Random(f"{seed}/{purpose}")


def uniform(seeds: Seeds, purpose: str, shape: Sequence[int] = ()) -> "Tensor":
    """Numbers in [0, 1), float64 `[B, *shape]` on the CPU; without a shape one per seed.

    Args:
        seeds: one integer per sample.
        purpose: what the numbers are for; each purpose has independent numbers.
        shape: of one sample.
    """
    rows = np.empty((len(seeds), prod(shape)))
    for row, generator in zip(rows, _generators(seeds, purpose), strict=True):
        generator.random(out=row)
    return _tensor(rows, shape)


def normal(seeds: Seeds, shape: Sequence[int], purpose: str) -> "Tensor":
    """Standard normal numbers, float32 `[B, *shape]` on the CPU; arguments as for `uniform`."""
    rows = np.empty((len(seeds), prod(shape)), dtype=np.float32)
    for row, generator in zip(rows, _generators(seeds, purpose), strict=True):
        generator.standard_normal(out=row, dtype=np.float32)
    return _tensor(rows, shape)


def _tensor(rows: np.ndarray, shape: Sequence[int]) -> "Tensor":
    import torch  # here, so that commands which only draw and choose start without it

    return torch.from_numpy(rows).view(len(rows), *shape)


def _generators(seeds: Seeds, purpose: str) -> Iterator[np.random.Generator]:
    """The generator of each seed; valid until the next one is taken."""
    domain = int.from_bytes(blake2b(purpose.encode(), digest_size=8).digest(), "little")
    philox = np.random.Philox(key=[0, domain])
    generator, state = np.random.Generator(philox), philox.state
    for seed in seeds if isinstance(seeds, Sequence) else seeds.tolist():
        # Resetting one generator costs a tenth of constructing another.
        state["state"]["key"] = np.array([seed % 2**64, domain], dtype=np.uint64)
        philox.state = state
        yield generator
