"""Features of a frozen part, cached instead of recomputed. Legend: N images."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class FeatureCache:
    """Caches one feature tensor per image, up to a number of bytes.

    Nothing is evicted: in a shuffled order every image is as likely to come next, so replacing entries gains nothing.

    Args:
        megabytes: memory on the computing device; 0 turns the cache off.
    """

    def __init__(self, megabytes: int):
        self.budget = megabytes * 2**20
        self.used = 0
        self.entries: dict[str, Tensor] = {}

    def __call__(self, keys: Sequence[str], pixels: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `compute(pixels)`, running it only on images that are not cached.

        Args:
            keys: one key per image, unique to its content.
            pixels: uint8 `[N, 3, H, W]`.
            compute: from images to features; row n must depend on image n alone.
        """
        if not self.budget or not keys:
            return compute(pixels)
        new = self.missing(keys)
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

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Positions of the images whose features have to be computed."""
        return [n for n, key in enumerate(keys) if key not in self.entries]
