"""Latents or codes that a first stage made of images become batches. Legend: C/h/w channels, rows and columns."""

from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from mmlab.data.config import ImageDataConfig
from mmlab.data.formats import ENCODED_AS, FIRST_STAGE, LATENTS, MAP_STAGE
from mmlab.data.image_collate import conditioned, mirrored, stack
from mmlab.data.image_condition import Conditioning
from mmlab.data.sample_types import ImageSpec, Prepared, Sample, SampleError

AGAIN = "encode the images again with `mmlab shards encode`"


class CacheCollate:
    """Tensors that `mmlab shards encode` made, with their conditioning.

    Args:
        config: settings; `flip` and the conditioning are drawn as by `ImageCollate`.
        made_by: fields of the record with the hashes of the first stages that the cache must come from.
        shape: of each tensor: `[C, h, w]` of latents, `[h, w]` of codes.
        conditioning: reads class or caption.
        images: also read the image that was kept beside the tensors.

    Attributes:
        kind: `latents` or `codes`.
        names: tensors that every sample has; those of mirrored images end in `_flipped`.
        optional: tensors that a sample may have.
    """

    kind: str
    names: tuple[str, ...]
    optional: tuple[str, ...] = ()
    dtype: torch.dtype
    image: ImageSpec | None

    def __init__(
        self,
        config: ImageDataConfig,
        made_by: dict[str, str],
        shape: tuple[int, ...],
        conditioning: Conditioning,
        images: bool = False,
    ):
        self.flip = config.flip
        spec = ImageSpec(config.size, config.aspect, reduce_jpegs=config.reduce_jpegs)
        self.image = spec if images else None
        self.made_by = {**made_by, ENCODED_AS: spec.form}
        self.shape = shape
        self.conditioning = conditioning
        self.members = (LATENTS, *conditioning.members)

    def prepare(self, sample: Sample) -> Prepared:
        """Read one sample.

        Raises:
            SampleError: `latents` for a damaged member, or for a cache of another kind, first stage, image size, aspect
                or shape, or without mirrored images; `no-picture` if the image was not kept; and what `Conditioning`
                raises.
        """
        where = f"source '{sample.source}'"
        self._check_record(sample, where)
        stored = stored_tensors(sample.members[LATENTS])
        held = "codes" if "codes" in stored else "latents" if "mean" in stored else self.kind
        if held != self.kind:
            raise SampleError(
                "latents", f"{where} holds {held}, not {self.kind}; encode the images with --as {self.kind}."
            )
        mirror = self.flip and mirrored(sample.seed)
        suffix = "_flipped" if mirror else ""
        values: dict[str, Tensor] = {}
        if self.image is not None:
            if sample.image is None:
                missing = f"{where} holds no images beside its {self.kind}"
                raise SampleError("no-picture", f"{missing}; encode with --keep-images, or set data.latents=false.")
            values["pixel_values"] = sample.image.flip(-1) if mirror else sample.image
        for name in (*self.names, *(name for name in self.optional if name in stored)):
            if name not in stored:
                raise SampleError("latents", f"It has no {name}.")
            if self.flip and f"{name}_flipped" not in stored:
                missing = f"{where} holds no {self.kind} of mirrored images"
                raise SampleError("latents", f"{missing}; encode with --flip, or set data.flip=false.")
            values[name] = stored[name + suffix].to(self.dtype)
            if tuple(values[name].shape) != self.shape:
                shapes = f"{list(values[name].shape)}, but the first stage makes {list(self.shape)}"
                raise SampleError("latents", f"'{name}' of {where} has the shape {shapes}: {AGAIN}.")
            if not values[name].isfinite().all():
                raise SampleError("latents", f"'{name}' of {where} has NaN or infinity: {AGAIN}.")
        return conditioned(sample, values, self.conditioning)

    def batch(self, contents: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Stack the samples: a `LatentBatch` or `CodeBatch`."""
        return stack(contents)

    def _check_record(self, sample: Sample, where: str) -> None:
        """Raise SampleError unless the cache holds what this run would make of the image itself."""
        if LATENTS not in sample.members:
            absent = f"{where} holds no {self.kind}"
            raise SampleError("latents", f"{absent}; make them with `mmlab shards encode`, or set data.latents=false.")
        for field, value in self.made_by.items():
            stated = sample.record.get(field)
            if stated == value:
                continue
            if field == ENCODED_AS:
                raise SampleError(
                    "latents",
                    f"the images of {where} were encoded with {stated}, but this run has {value}: set what they have,"
                    f" or {AGAIN}.",
                )
            raise SampleError(
                "latents",
                f"the {self.kind} of {where} were made by the {field.replace('_', ' ')} {stated}, but this model's is"
                f" {value}: {AGAIN}.",
            )


class LatentCollate(CacheCollate):
    """Posteriors of a first stage, see `LatentBatch`; a deterministic one has no `logvar`."""

    kind, names, optional, dtype = "latents", ("mean",), ("logvar",), torch.float32

    def __init__(
        self,
        config: ImageDataConfig,
        first_stage: str,
        shape: tuple[int, int, int],
        conditioning: Conditioning,
        images: bool = False,
    ):
        super().__init__(config, {FIRST_STAGE: first_stage}, shape, conditioning, images)


class CodeCollate(CacheCollate):
    """Codes of a VQ first stage, `side` x `side`, and with a `map_stage` those of the images' maps, see `CodeBatch`."""

    kind, names, dtype = "codes", ("codes",), torch.int64

    def __init__(
        self,
        config: ImageDataConfig,
        first_stage: str,
        side: int,
        conditioning: Conditioning,
        map_stage: str | None = None,
    ):
        maps = {} if map_stage is None else {MAP_STAGE: map_stage}
        super().__init__(config, {FIRST_STAGE: first_stage, **maps}, (side, side), conditioning)
        self.names = ("codes", "map_codes") if maps else ("codes",)


def stored_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a cached sample; raises SampleError `latents` if they are damaged."""
    try:
        return load(data)
    except SafetensorError as error:
        raise SampleError("latents", f"Its latents cannot be read: {error}.") from error
