"""Images become batches for generative models. Legend: S side."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from mmlab.config.errors import DataError
from mmlab.data.config import ImageDataConfig
from mmlab.data.formats import FIRST_STAGE, MAP
from mmlab.data.image_condition import Conditioning
from mmlab.data.images import decode_image
from mmlab.data.sample_types import ImageSpec, Prepared, Sample, SampleError
from mmlab.keyed import draw


def mirrored(seed: int) -> bool:
    """Whether a sample with this seed is mirrored where `flip` is on: images and cached latents agree."""
    return draw(seed, "flip") < 0.5


class ImageCollate:
    """Images, squares or all in one bucket, with their conditioning, see `ImageBatch`.

    Args:
        config: settings.
        conditioning: reads class or caption.
        maps: also read each image's map, and mirror it with the image.
    """

    def __init__(self, config: ImageDataConfig, conditioning: Conditioning, maps: bool = False):
        self.image: ImageSpec | None = ImageSpec(
            config.size, config.aspect, reduce_jpegs=config.reduce_jpegs, buckets=config.shapes
        )
        self.flip = config.flip
        self.maps = maps
        self.conditioning = conditioning
        self.members = (*conditioning.members, *((MAP,) if maps else ()))

    def prepare(self, sample: Sample) -> Prepared:
        """Read one sample.

        Raises:
            SampleError: `no-picture`, also for latents or codes, `no-map`, and what `Conditioning` and `decode_image`
                raise.
        """
        if sample.image is None:
            if FIRST_STAGE in sample.record:
                where = f"source '{sample.source}'"
                raise SampleError("no-picture", f"{where} holds latents or codes, not images; set data.latents=true.")
            raise SampleError("no-picture", "The sample has no image.")
        values = {"pixel_values": sample.image}
        if self.maps:
            assert self.image is not None
            values["map_pixels"] = map_of(sample.members, self.image)
        if self.flip and mirrored(sample.seed):
            values = {name: pixels.flip(-1) for name, pixels in values.items()}
        return conditioned(sample, values, self.conditioning)

    def batch(self, contents: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Stack the samples: an `ImageBatch`."""
        return stack(contents)


def map_of(members: Mapping[str, bytes], spec: ImageSpec) -> Tensor:
    """A sample's map, uint8 `[3, S, S]`; raises SampleError `no-map`, and what `decode_image` raises."""
    if MAP not in members:
        raise SampleError("no-map", f"The sample has no {MAP}.")
    return decode_image(members[MAP], spec)


def conditioned(sample: Sample, values: dict[str, Tensor], conditioning: Conditioning) -> Prepared:
    """The values of a sample, such as its pixels or latents, with its conditioning and its seed."""
    conditions, counters = conditioning(sample)
    return Prepared({**values, **conditions, "seeds": torch.tensor(sample.seed)}, {"pictures": 1, **counters})


def stack(contents: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of the values of samples; raises DataError if some have values that others lack, such as `logvar`."""
    if some := {name for content in contents for name in content.keys() ^ contents[0].keys()}:
        raise DataError(f"some samples of a batch have {', '.join(sorted(some))} and others do not; encode them alike.")
    # torch's function stacks into shared memory, if in a data worker, so that nothing is copied once more.
    return {name: default_collate([content[name] for content in contents]) for name in contents[0]}
