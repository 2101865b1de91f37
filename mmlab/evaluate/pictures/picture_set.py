"""Images of a set of shards, decoded as in training, with their records. Legend: S side, B images."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmlab.config.locations import Location
from mmlab.data.bad_samples import BadSamples
from mmlab.data.config import ShardsConfig
from mmlab.data.formats import MAP, parse_record
from mmlab.data.index import ShardIndex
from mmlab.data.progress_bar import progress
from mmlab.data.sample_types import ImageSpec, Sample, SampleError
from mmlab.data.subsets import evenly_spaced
from mmlab.evaluate.pictures.picture_files import PictureFiles
from mmlab.evaluate.questions import read_picture


class PictureSet:
    """Images spread evenly over a set of shards.

    Args:
        path: folder or address of shards, or the opened images.
        spec: how images are decoded.
        limit: at most this many; None: all.
        budget: share of the images that may be unusable; those are left out.

    Attributes:
        places: places of the images in the index; `batches` removes those that cannot be decoded.
        bad: the samples that are left out.

    Raises:
        DataError: no such shards.
    """

    def __init__(
        self,
        path: str | Location | ShardIndex | PictureFiles,
        spec: ImageSpec,
        limit: int | None = None,
        budget: float = ShardsConfig.bad_budget,
    ):
        self.index: Any = ShardIndex.open(path) if isinstance(path, str | Location) else path
        self.spec = spec
        self.places = evenly_spaced(len(self.index), limit or len(self.index))
        self.bad = BadSamples(self.index.root, len(self.places), budget)

    def __len__(self) -> int:
        return len(self.places)

    def picture(self, n: int) -> Tensor:
        """The n-th image, uint8 `[3, S, S]`; raises SampleError if the sample has none that can be decoded."""
        return self._picture(self.places[n])

    def first(self) -> Tensor:
        """The first image that can be decoded; raises DataError if there is none."""
        for place in self.places:
            with self.bad.left_out(str(self.index.keys[place])):
                return self._picture(place)
        self.bad.refuse_all("images")

    def _picture(self, place: int) -> Tensor:
        picture = read_picture(self.index, place, self.spec)
        if picture is None:
            raise SampleError("no-picture", "It has no image; scores need the images, not their latents.")
        return picture

    def key(self, n: int) -> str:
        """The key of the n-th image's sample."""
        return str(self.index.keys[self.places[n]])

    def sample(self, n: int) -> Sample:
        """The n-th sample without its image, as a collate receives it; its seed is n.

        Raises:
            SampleError: its record cannot be used.
        """
        members = self.index.read(self.places[n], ("json", "txt", "cls", MAP))
        return Sample(self.key(n), self.index.root.name, parse_record(members), (), n, members)

    def batches(self, size: int, label: str) -> Iterator[Tensor]:
        """All images, uint8 `[B, 3, S, S]`, B ≤ size, with a progress bar called `label`.

        Afterwards the n-th image of the set is the n-th one that was yielded.

        Raises:
            DataError: no image can be decoded, or more are bad than the budget allows.
        """
        places, decoded = self.places, []
        for start in progress(range(0, len(places), size), label, -(-len(places) // size)):
            pixels = []
            for place in places[start : start + size]:
                with self.bad.left_out(str(self.index.keys[place])):
                    pixels.append(self._picture(place))
                    decoded.append(place)
            if pixels:
                yield torch.stack(pixels)
        self.places = decoded
        if not decoded:
            self.bad.refuse_all("images")

    def describe(self) -> dict[str, Any]:
        """Path, number and format of the images, and the hash of the shards' index."""
        return {
            "path": str(self.index.root),
            "pictures": len(self),
            "index": self.index.hash[:16],
            "form": f"{self.spec.size} px, aspect {self.spec.aspect}, bicubic with antialiasing, uint8",
        }
