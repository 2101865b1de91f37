"""Pictures, or the latents that a first stage made of them, become batches. Legend: S side, C/h/w latent sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from mmlab.config.errors import ConfigError, DataError, nearest
from mmlab.data.formats import MAP
from mmlab.data.image_condition import Conditioning
from mmlab.data.images import ASPECTS, decode_image
from mmlab.data.sample import ImageSpec, Sample, SampleError
from mmlab.keyed import draw

LATENTS = "safetensors"
"""The member that holds a picture's posterior: `mean`, `logvar`, and `mean_flipped`, `logvar_flipped` of its mirror
image, float16 or float32 `[C, h, w]`; no `logvar` where the first stage is deterministic."""
FIRST_STAGE = "first_stage"
"""The record's field with the fingerprint of the first stage that encoded it."""
ENCODED_AS = "encoded_as"
"""The record's field with the form of the picture that was encoded, see `form`."""


def form(size: int, aspect: str) -> str:
    """A square picture's size and how it became square, as a record of latents has them."""
    return f"data.size={size} data.aspect={aspect}"


@dataclass(frozen=True)
class PreparedImage:
    """One sample on its way into a batch.

    Attributes:
        key, source, seed: of the sample.
        values: tensors of one row each, by their name in the batch.
        counters: what happened to the sample, for the data report.
    """

    key: str
    source: str
    seed: int
    values: dict[str, Tensor]
    counters: dict[str, int]


def mirrored(seed: int) -> bool:
    """Whether a sample with this seed is mirrored, where mirroring is on: pictures and cached latents agree."""
    return draw(seed, "flip") < 0.5


class ImageCollate:
    """Square pictures with their class or caption, see `ImageBatch`.

    Args:
        size: S, side of the pictures in pixels.
        aspect: `crop` the centre, `pad` or `stretch`.
        flip: mirror half of the pictures, drawn by their seeds. Captions that say left and right become wrong.
        conditioning: reads class or caption; None reads neither.
        maps: read each picture's map, too, and treat it alike.

    Raises:
        ConfigError: an unknown aspect.
    """

    def __init__(
        self,
        size: int,
        aspect: str = "crop",
        flip: bool = False,
        conditioning: Conditioning | None = None,
        maps: bool = False,
    ):
        if aspect not in ASPECTS:
            raise ConfigError(f"data.aspect={aspect} is none of {', '.join(ASPECTS)}.{nearest(aspect, ASPECTS)}")
        self.image: ImageSpec | None = ImageSpec(size, aspect)
        self.flip = flip
        self.maps = maps
        self.conditioning = conditioning or Conditioning()
        self.members = (*self.conditioning.members, *((MAP,) if maps else ()))

    def prepare(self, sample: Sample) -> PreparedImage:
        """Read one sample.

        Raises:
            SampleError: `no-picture`, `no-map`, and what `Conditioning` and `decode_image` raise.
            DataError: the shards hold latents.
        """
        if sample.image is None:
            if FIRST_STAGE in sample.record:
                where = f"source '{sample.source}'"
                raise DataError(f"{where} holds latents or codes, not pictures; set data.latents=true.")
            raise SampleError("no-picture", "The sample has no picture.")
        values = {"pixel_values": sample.image}
        if self.maps:
            assert self.image is not None
            values["map_pixels"] = map_of(sample.members, self.image)
        if self.flip and mirrored(sample.seed):
            values = {name: pixels.flip(-1) for name, pixels in values.items()}
        return prepared_image(sample, values, self.conditioning)

    def batch(self, prepared: list[PreparedImage]) -> dict[str, Any]:
        """Stack the samples: an `ImageBatch`."""
        return stacked(prepared)


def map_of(members: Mapping[str, bytes], spec: ImageSpec) -> Tensor:
    """A sample's map, uint8 `[3, S, S]`; raises SampleError `no-map`, and what `decode_image` raises."""
    if MAP not in members:
        raise SampleError("no-map", f"The sample has no {MAP}.")
    return decode_image(members[MAP], spec)


class LatentCollate:
    """Latents that `mmlab shards encode` made, with class or caption, see `LatentBatch`; no picture is read.

    Args:
        first_stage: fingerprint of the first stage that the latents must come from.
        shape: (C, h, w) that it makes of the configured pictures.
        encoded_as: `form` of these pictures.
        flip, conditioning: as for `ImageCollate`, and drawn alike.
    """

    def __init__(
        self,
        first_stage: str,
        shape: tuple[int, int, int],
        encoded_as: str,
        flip: bool = False,
        conditioning: Conditioning | None = None,
    ):
        self.image: ImageSpec | None = None
        self.first_stage = first_stage
        self.shape = shape
        self.encoded_as = encoded_as
        self.flip = flip
        self.conditioning = conditioning or Conditioning()
        self.members = (LATENTS, *self.conditioning.members)

    def prepare(self, sample: Sample) -> PreparedImage:
        """Read one sample.

        Raises:
            SampleError: `latents` for a damaged member, and what `Conditioning` raises.
            DataError: no latents, those of another first stage, picture size or aspect, or none of mirrored pictures.
        """
        where = f"source '{sample.source}'"
        refuse_other_cache(sample, "latents", {FIRST_STAGE: self.first_stage}, self.encoded_as)
        stored = stored_tensors(sample.members[LATENTS])
        if "codes" in stored:
            raise DataError(f"{where} holds codes, not latents; encode the pictures with --as latents.")
        ending = "_flipped" if self.flip and mirrored(sample.seed) else ""
        if self.flip and "mean_flipped" not in stored:
            raise DataError(f"{where} holds no latents of mirrored pictures; encode with --flip, or data.flip=false.")
        values = {name: stored[name + ending].float() for name in ("mean", "logvar") if name + ending in stored}
        if "mean" not in values:
            raise SampleError("latents", "Its latents have no mean.")
        for tensor in values.values():
            if tuple(tensor.shape) != self.shape:
                raise DataError(
                    f"the latents of {where} have the shape {list(tensor.shape)}, and the first stage makes"
                    f" {list(self.shape)}: encode the pictures again with `mmlab shards encode`."
                )
        return prepared_image(sample, values, self.conditioning)

    def batch(self, prepared: list[PreparedImage]) -> dict[str, Any]:
        """Stack the samples: a `LatentBatch`."""
        return stacked(prepared)


def refuse_other_cache(sample: Sample, what: str, made_by: Mapping[str, str], encoded_as: str) -> None:
    """Check that a sample of a cache is what this run would make of its picture itself.

    Args:
        sample: with its members.
        what: it is to hold: latents or codes.
        made_by: the record's fields with fingerprints, and what they have to be.
        encoded_as: `form` of this run's pictures.

    Raises:
        DataError: nothing of the kind, or what other first stages made, or of another picture size or aspect.
    """
    where = f"source '{sample.source}'"
    if LATENTS not in sample.members:
        raise DataError(f"{where} holds no {what}; make them with `mmlab shards encode`, or data.latents=false.")
    for field, wanted in made_by.items():
        found = sample.record.get(field)
        if found != wanted:
            raise DataError(
                f"the {what} of {where} were made by the {field.replace('_', ' ')} {found}, and this model's is"
                f" {wanted}: encode the pictures again with `mmlab shards encode`."
            )
    found = sample.record.get(ENCODED_AS)
    if found != encoded_as:
        # Caches from before this field cannot say; `mmlab shards encode` takes both from the first stage's run.
        way = "encode them again with `mmlab shards encode`" if found is None else "set what they have"
        raise DataError(
            f"the pictures of {where} were encoded with {found or 'an unknown data.aspect'}, and this run has"
            f" {encoded_as}: {way}."
        )


def stored_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a cache's member; raises SampleError `latents` where it is damaged."""
    try:
        return load(data)
    except SafetensorError as error:
        raise SampleError("latents", f"Its latents cannot be read: {error}.") from error


def prepared_image(sample: Sample, values: dict[str, Tensor], conditioning: Conditioning) -> PreparedImage:
    """A sample with its picture (or what was made of it) and its conditioning."""
    conditions, counters = conditioning(sample)
    return PreparedImage(sample.key, sample.source, sample.seed, {**values, **conditions}, {"pictures": 1, **counters})


def stacked(prepared: list[PreparedImage]) -> dict[str, Any]:
    """One batch of the samples, with their seeds, keys and counters."""
    stats: dict[str, dict[str, int]] = {}
    for one in prepared:
        known = stats.setdefault(one.source, {})
        for name, count in one.counters.items():
            known[name] = known.get(name, 0) + count
    rows = {name: torch.stack([one.values[name] for one in prepared]) for name in prepared[0].values}
    seeds = torch.tensor([one.seed for one in prepared], dtype=torch.int64)
    return {**rows, "seeds": seeds, "keys": [one.key for one in prepared], "stats": stats, "bad": []}
