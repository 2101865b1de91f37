"""Pictures are encoded once instead of at every step: shards of latents. Legend: B pictures, C/h/w sizes of latents."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from mmlab.config.errors import ConfigError, DataError, RunError
from mmlab.data.cache_collate import MAP_STAGE
from mmlab.data.formats import IMAGE_EXTENSIONS, MAP, parse_record
from mmlab.data.image_collate import ENCODED_AS, FIRST_STAGE, LATENTS, form, map_of
from mmlab.data.images import decode_image
from mmlab.data.index import ShardIndex
from mmlab.data.sample import ImageSpec, SampleError
from mmlab.data.shards import Samples
from mmlab.model.autoencoder import VQAutoencoder
from mmlab.model.first_stage import FirstStage, to_signed
from mmlab.runs.run import load_run_config
from mmlab.stage.assembly import restore
from mmlab.weights import fingerprint

DTYPES = {"float32": torch.float32, "float16": torch.float16}
KEPT = ("json", "txt", "cls")
"""Members that go from the pictures' shards into those of the latents: what a model may be told."""


def first_stage_of(folder: Path, measured: bool = True) -> tuple[FirstStage, ImageSpec]:
    """The first stage of a finished run, and the form of the pictures that it was trained on.

    Args:
        folder: of the run.
        measured: whether the latents' statistics must be known; codes need none.

    Raises:
        ConfigError: the run has no first stage, one that makes no latents, or one whose statistics are not measured
            (they are part of what a cache is checked by).
    """
    if "first_stage" not in load_run_config(folder).model:
        raise ConfigError(f"{folder} has no first stage; give a run of stage=autoencoder, or one that started from it.")
    model, cfg = restore(folder)
    first_stage = model.first_stage
    if first_stage.factor == 1:
        raise ConfigError(f"The first stage of {folder} is the identity: its latents are the pictures themselves.")
    if measured and not first_stage.measured:
        raise ConfigError(f"The latent statistics of {folder} were never measured; finish its training first.")
    return first_stage, ImageSpec(cfg.data.size, cfg.data.aspect)


def latents(
    first_stage: FirstStage,
    index: ShardIndex,
    spec: ImageSpec,
    dtype: str = "float32",
    flip: bool = False,
    batch_size: int = 64,
    missing_budget: float = 0.0,
) -> Samples:
    """Encode every picture of a set of shards, in its order.

    A sample keeps its record, to which the first stage's fingerprint and the picture's form are added, its text and its
    class; in place of the picture it gets `safetensors` with `mean` and, where the posterior is not deterministic,
    `logvar` `[C, h, w]`.

    Args:
        first_stage: in eval mode, on its device.
        index: open shards with pictures.
        spec: how the pictures are decoded.
        dtype: `float32`, or `float16` at half the size.
        flip: encode the mirror images too, as `mean_flipped` and `logvar_flipped`.
        batch_size: pictures that are encoded at a time.
        missing_budget: share of the samples whose picture may be absent or unreadable.

    Returns:
        Counts: `samples`, `unreadable` (left out).

    Raises:
        DataError: losses beyond the budget.
        RunError: a latent that is not finite, or that the dtype does not hold.
    """
    made_by = fingerprint(first_stage)
    device = first_stage.latent_mean.device
    counts = {"samples": 0, "unreadable": 0}
    pictures = readable(index, spec, counts, int(missing_budget * len(index)))
    while rows := list(islice(pictures, batch_size)):
        pixels = torch.stack([picture for _, _, (picture,) in rows]).to(device)
        values = _posterior(first_stage, pixels, "")
        if flip:
            values |= _posterior(first_stage, pixels.flip(-1), "_flipped")
        stored = {name: value.to(DTYPES[dtype]) for name, value in values.items()}
        _refuse_infinite(stored, dtype)
        for n, (key, members, _) in enumerate(rows):
            tensors = {name: value[n] for name, value in stored.items()}
            yield key, encoded(members, tensors, {FIRST_STAGE: made_by}, spec)
            counts["samples"] += 1
    return counts


def encoded(
    members: dict[str, bytes], tensors: dict[str, Tensor], made_by: dict[str, str], spec: ImageSpec
) -> dict[str, Any]:
    """The members of a cache's sample: what was told of its picture, by what it was encoded, and the tensors."""
    record = {**parse_record(members), **made_by, ENCODED_AS: form(spec.size, spec.aspect)}
    own: dict[str, Any] = {name: members[name] for name in KEPT if name in members}
    return {**own, "json": record, LATENTS: save({name: value.contiguous() for name, value in tensors.items()})}


@torch.no_grad()
def _posterior(first_stage: FirstStage, pixels_B3HW: Tensor, ending: str) -> dict[str, Tensor]:
    """Mean and log variance, fp32 `[B, C, h, w]` on the CPU, of uint8 pictures."""
    posterior = first_stage.encode(to_signed(pixels_B3HW))
    found = {"mean": posterior.mean, "logvar": posterior.logvar}
    return {name + ending: value.float().cpu() for name, value in found.items() if value is not None}


def readable(
    index: ShardIndex, spec: ImageSpec, counts: dict[str, int], allowed: int, maps: bool = False
) -> Iterator[tuple[str, dict[str, bytes], list[Tensor]]]:
    """(key, members, uint8 `[3, S, S]` of the picture, and with `maps` of its map) of each sample that can be read.

    Args:
        index: open shards with pictures.
        spec: how pictures are decoded.
        counts: where `unreadable` ones are counted.
        allowed: how many of them there may be.
        maps: whether the map is needed, too.

    Raises:
        DataError: more are unreadable.
    """
    for i, key in enumerate(index.keys):
        try:
            members = index.read(i, (*IMAGE_EXTENSIONS, *KEPT, *((MAP,) if maps else ())))
            data = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
            if data is None:
                raise SampleError("no-picture", "it has no picture")
            parse_record(members)
            pictures = [decode_image(data, spec), *([map_of(members, spec)] if maps else [])]
        except (SampleError, ValueError, RecursionError) as error:
            counts["unreadable"] += 1
            if counts["unreadable"] > allowed:
                raise DataError(
                    f"{index.root}: sample {key} cannot be encoded ({error}); {counts['unreadable']} are lost and the"
                    f" missing budget allows {allowed}."
                ) from error
            continue
        yield str(key), members, pictures


def _refuse_infinite(stored: dict[str, Tensor], dtype: str) -> None:
    for name, value in stored.items():
        if not value.isfinite().all():
            hint = " float16 holds nothing above 65,504: encode with --dtype float32." if dtype == "float16" else ""
            raise RunError(f"The first stage gave a {name} that is not finite in {dtype}.{hint}")


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
