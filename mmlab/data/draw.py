"""Randomness keyed by a sample's seed: the same draw in every worker, on every rank, after every restart."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")


def draw(seed: int, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing but `seed` and what it is for."""
    digest = blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53  # a float64 holds 53 bits


def choose(options: Sequence[T], seed: int, purpose: str) -> T:
    """One of `options`, drawn by `seed`."""
    return options[int(draw(seed, purpose) * len(options))]
