"""Features of a frozen part, kept instead of recomputed. Legend: N pictures."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class FeatureCache:
    """Remembers one feature tensor per picture key, up to a number of bytes; nothing is evicted.

    A full cache keeps what it has: with a shuffled order every picture is as likely to come next as any
    other, so replacing entries would gain nothing.

    Args:
        megabytes: memory to spend on the computing device; 0 turns the cache off.
    """

    def __init__(self, megabytes: int):
        self.budget = megabytes * 2**20
        self.used = 0
        self.entries: dict[str, Tensor] = {}

    def __call__(self, keys: Sequence[str], pixels: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `compute(pixels)`, running it on the unknown pictures only.

        Args:
            keys: one key per picture, unique to its content.
            pixels: uint8 `[N, 3, H, W]`.
            compute: from pictures to features; row n must depend on picture n alone.
        """
        if not self.budget or not keys:
            return compute(pixels)
        new = [n for n, key in enumerate(keys) if key not in self.entries]
        fresh: dict[str, Tensor] = {}
        if new:
            for n, feature in zip(new, compute(pixels[new]).detach().unbind(), strict=True):
                fresh[keys[n]] = feature
                size = feature.numel() * feature.element_size()
                if self.used + size <= self.budget and keys[n] not in self.entries:
                    # A clone: a view would keep the whole batch of features alive.
                    self.entries[keys[n]] = feature.clone()
                    self.used += size
        return torch.stack([fresh[key] if key in fresh else self.entries[key] for key in keys])
