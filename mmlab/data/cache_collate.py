"""Codes that a VQ first stage made of pictures become batches. Legend: h/w rows and columns of codes."""

from typing import Any

import torch
from torch import Tensor

from mmlab.config.errors import DataError
from mmlab.data.image_collate import (
    FIRST_STAGE,
    LATENTS,
    PreparedImage,
    mirrored,
    prepared_image,
    refuse_other_cache,
    stacked,
    stored_tensors,
)
from mmlab.data.image_condition import Conditioning
from mmlab.data.sample import ImageSpec, Sample, SampleError

MAP_STAGE = "map_stage"
"""The record's field with the fingerprint of the first stage that encoded its map."""


class CodeCollate:
    """Codes that `mmlab shards encode` made, with class, caption or the codes of maps, see `CodeBatch`.

    The member holds `codes`, and of mirror images `codes_flipped`, uint16 or uint32 `[h, w]`; of maps `map_codes` and
    `map_codes_flipped`.

    Args:
        first_stage: fingerprint of the first stage that the codes must come from.
        side: h and w.
        encoded_as: `form` of the pictures.
        flip, conditioning: as for `ImageCollate`, and drawn alike.
        map_stage: fingerprint of the first stage of the maps; None reads none.
    """

    def __init__(
        self,
        first_stage: str,
        side: int,
        encoded_as: str,
        flip: bool = False,
        conditioning: Conditioning | None = None,
        map_stage: str | None = None,
    ):
        self.image: ImageSpec | None = None
        self.made_by = {FIRST_STAGE: first_stage, **({} if map_stage is None else {MAP_STAGE: map_stage})}
        self.side = side
        self.encoded_as = encoded_as
        self.flip = flip
        self.wanted = ("codes",) if map_stage is None else ("codes", "map_codes")
        self.conditioning = conditioning or Conditioning()
        self.members = (LATENTS, *self.conditioning.members)

    def prepare(self, sample: Sample) -> PreparedImage:
        """Read one sample.

        Raises:
            SampleError: `latents` for a damaged member, and what `Conditioning` raises.
            DataError: no codes, those of another first stage, picture size or aspect, or none of mirrored pictures.
        """
        refuse_other_cache(sample, "codes", self.made_by, self.encoded_as)
        stored = stored_tensors(sample.members[LATENTS])
        ending = "_flipped" if self.flip and mirrored(sample.seed) else ""
        values = {name: self._codes(stored, name, ending, sample.source) for name in self.wanted}
        return prepared_image(sample, values, self.conditioning)

    def _codes(self, stored: dict[str, Tensor], name: str, ending: str, source: str) -> Tensor:
        where = f"source '{source}'"
        if "mean" in stored:
            raise DataError(f"{where} holds latents, not codes; encode the pictures with --as codes.")
        if name not in stored:
            raise SampleError("latents", f"It has no {name}.")
        if self.flip and f"{name}_flipped" not in stored:
            raise DataError(f"{where} holds no codes of mirrored pictures; encode with --flip, or data.flip=false.")
        codes = stored[name + ending].to(torch.int64)
        if tuple(codes.shape) != (self.side, self.side):
            raise DataError(
                f"the {name} of {where} have the shape {list(codes.shape)}, and the first stage makes"
                f" {[self.side, self.side]}: encode the pictures again with `mmlab shards encode`."
            )
        return codes

    def batch(self, prepared: list[PreparedImage]) -> dict[str, Any]:
        """Stack the samples: a `CodeBatch`."""
        return stacked(prepared)
