"""Pictures are encoded once instead of at every step: shards of codes. Legend: h/w rows and columns of codes."""

from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.config.run import load_run_config
from mmlab.data.code_collate import MAP_STAGE
from mmlab.data.image_collate import FIRST_STAGE
from mmlab.data.index import ShardIndex
from mmlab.data.sample import ImageSpec
from mmlab.data.shards import Samples
from mmlab.model.autoencoder import VQAutoencoder
from mmlab.model.first_stage import FirstStage, to_signed
from mmlab.stage.latent_cache import encoded, readable
from mmlab.training.artifacts import fingerprint

SMALL = 1 << 16
"""Codes that uint16 holds."""


def kind_of(folder: Path, asked: str | None) -> str:
    """What a run's first stage encodes pictures as: what was asked for, else `codes` where it has a codebook.

    Raises:
        ConfigError: codes are asked of a first stage without a codebook.
    """
    has_codes = "quantizer" in (load_run_config(folder).model.get("first_stage") or {})
    if asked == "codes" and not has_codes:
        raise ConfigError(f"The first stage of {folder} has no codebook, so it makes no codes; encode --as latents.")
    return asked or ("codes" if has_codes else "latents")


def codes(
    first_stage: FirstStage,
    index: ShardIndex,
    spec: ImageSpec,
    flip: bool = False,
    batch_size: int = 64,
    missing_budget: float = 0.0,
    map_stage: FirstStage | None = None,
) -> Samples:
    """Encode every picture of a set of shards, in its order.

    A sample keeps its record, to which the first stage's fingerprint and the picture's form are added, its text and its
    class; in place of the picture it gets `safetensors` with `codes` `[h, w]`, uint16, or uint32 for books that need
    it: two bytes a code, where a latent takes four for each of its channels.

    Args:
        first_stage: with a codebook, in eval mode, on its device.
        index: open shards with pictures.
        spec: how the pictures are decoded.
        flip: encode the mirror images too, as `codes_flipped`.
        batch_size: pictures that are encoded at a time.
        missing_budget: share of the samples whose picture may be absent or unreadable.
        map_stage: encodes the pictures' maps, as `map_codes`; None leaves them out.

    Returns:
        Counts: `samples`, `unreadable` (left out).

    Raises:
        ConfigError: a first stage without a codebook.
        DataError: losses beyond the budget.
    """
    stages = {"codes": _with_codes(first_stage)}
    made_by = {FIRST_STAGE: fingerprint(first_stage)}
    if map_stage is not None:
        stages["map_codes"] = _with_codes(map_stage)
        made_by[MAP_STAGE] = fingerprint(map_stage)
    counts = {"samples": 0, "unreadable": 0}
    pictures = readable(index, spec, counts, int(missing_budget * len(index)), "map_codes" in stages)
    while rows := list(islice(pictures, batch_size)):
        stored: dict[str, Tensor] = {}
        for n, (name, stage) in enumerate(stages.items()):
            pixels = torch.stack([pair[n] for _, _, pair in rows]).to(first_stage.latent_mean.device)
            stored[name] = _encode(stage, pixels)
            if flip:
                stored[f"{name}_flipped"] = _encode(stage, pixels.flip(-1))
        for n, (key, members, _) in enumerate(rows):
            yield key, encoded(members, {name: value[n] for name, value in stored.items()}, made_by, spec)
            counts["samples"] += 1
    return counts


@torch.no_grad()
def _encode(stage: VQAutoencoder, pixels_B3SS: Tensor) -> Tensor:
    """uint16 or uint32 `[B, h, w]` on the CPU."""
    found = stage.codes(to_signed(pixels_B3SS)).cpu()
    return found.to(torch.uint16 if stage.quantizer.codes <= SMALL else torch.uint32)


def _with_codes(stage: FirstStage) -> VQAutoencoder:
    if not isinstance(stage, VQAutoencoder):
        raise ConfigError(f"{type(stage).__name__} has no codebook, so it makes no codes; encode --as latents.")
    return stage
