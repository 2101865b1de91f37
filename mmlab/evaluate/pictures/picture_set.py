"""Images of a set of shards, decoded as in training, with their records. Legend: S side, B images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmlab.config.errors import DataError
from mmlab.data.formats import MAP, parse_record
from mmlab.data.index import ShardIndex
from mmlab.data.progress_bar import progress
from mmlab.data.sample_types import ImageSpec, Sample, SampleError
from mmlab.evaluate.questions import read_picture


class PictureSet:
    """Images spread evenly over a set of shards.

    Args:
        path: folder of shards.
        spec: how images are decoded.
        limit: at most this many; None: all.

    Raises:
        DataError: no such shards.
    """

    def __init__(self, path: str | Path, spec: ImageSpec, limit: int | None = None):
        self.index = ShardIndex.open(path)
        self.spec = spec
        count = min(limit or len(self.index), len(self.index))
        self.places = np.unique(np.linspace(0, len(self.index) - 1, count).round().astype(int)).tolist()

    def __len__(self) -> int:
        return len(self.places)

    def picture(self, n: int) -> Tensor:
        """The n-th image, uint8 `[3, S, S]`; raises DataError if the sample has none."""
        picture = read_picture(self.index, self.places[n], self.spec)
        if picture is None:
            raise DataError(
                f"{self.index.root}: sample {self.key(n)} has no image; scores need the images, not their latents."
            )
        return picture

    def key(self, n: int) -> str:
        """The key of the n-th image's sample."""
        return str(self.index.keys[self.places[n]])

    def sample(self, n: int) -> Sample:
        """The n-th sample without its image, as a collate receives it; its seed is n.

        Raises:
            DataError: its record cannot be read.
        """
        try:
            members = self.index.read(self.places[n], ("json", "txt", "cls", MAP))
            record = parse_record(members)
        except (SampleError, ValueError, RecursionError) as error:
            raise DataError(f"{self.index.root}: the record of sample {self.key(n)} cannot be read: {error}") from error
        return Sample(self.key(n), self.index.root.name, record, None, n, members)

    def batches(self, size: int, label: str) -> Iterator[Tensor]:
        """All images, uint8 `[B, 3, S, S]`, B ≤ size, with a progress bar called `label`."""
        for start in progress(range(0, len(self), size), label, -(-len(self) // size)):
            yield torch.stack([self.picture(n) for n in range(start, min(start + size, len(self)))])

    def describe(self) -> dict[str, Any]:
        """Path, number and format of the images, and the hash of the shards' index."""
        return {
            "path": str(self.index.root),
            "pictures": len(self),
            "index": self.index.hash[:16],
            "form": f"{self.spec.size} px, aspect {self.spec.aspect}, bicubic with antialiasing, uint8",
        }
