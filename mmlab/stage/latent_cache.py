"""Shards of latents or codes: images are encoded once, not at every step. Legend: B images, C/h/w sizes of latents."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from mmlab.config.errors import ConfigError, DataError, RunError
from mmlab.data.bad_samples import sample_errors
from mmlab.data.formats import ENCODED_AS, FIRST_STAGE, IMAGE_EXTENSIONS, LATENTS, MAP, MAP_STAGE, parse_record
from mmlab.data.image_collate import map_of
from mmlab.data.images import decode_image
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec, SampleError
from mmlab.data.shard_files import Samples
from mmlab.data.tally import Tally
from mmlab.model.autoencoder import VQAutoencoder
from mmlab.model.first_stage import FirstStage, to_signed
from mmlab.runs.freed_memory import keep_freed_memory
from mmlab.runs.run import load_run_config
from mmlab.stage.assembly import restore
from mmlab.weights import content_hash, finite

DTYPES = {"float32": torch.float32, "float16": torch.float16}
KEPT = ("json", "txt", "cls")
"""Members that are copied from the images' shards: what a model may be conditioned on."""
SMALL = 1 << 16
"""Codes that uint16 holds."""
Encode = Callable[[str, FirstStage, Tensor], dict[str, Tensor]]
"""From a first stage (the record's field with its hash, itself) and uint8 images to tensors, one row each."""


def first_stage_of(folder: Path, measured: bool = True) -> tuple[FirstStage, ImageSpec]:
    """Return the first stage of a finished run, and how the images that it was trained on are decoded.

    Args:
        folder: of the run.
        measured: whether it must have latent statistics, which are part of its hash; codes need none.

    Raises:
        ConfigError: no first stage, one without latents, or one without statistics.
    """
    if "first_stage" not in load_run_config(folder).model:
        raise ConfigError(
            f"{folder} has no first stage; choose a run of stage=autoencoder, or one that started from it."
        )
    model, cfg = restore(folder)
    first_stage = model.first_stage
    if first_stage.factor == 1:
        raise ConfigError(f"The first stage of {folder} is the identity: its latents are the images themselves.")
    if measured and not first_stage.measured:
        raise ConfigError(
            f"The latent statistics of {folder} were not measured; encode with a finished run of stage=autoencoder or"
            " stage=latent_diffusion."
        )
    return first_stage, ImageSpec(cfg.data.size, cfg.data.aspect, reduce_jpegs=cfg.data.reduce_jpegs)


def encoding_of(folder: Path, requested: str | None) -> str:
    """What a run's first stage encodes images as: `latents` or `codes`, by default codes if it has a codebook.

    Raises:
        ConfigError: codes of a first stage without a codebook.
    """
    has_codes = "quantizer" in (load_run_config(folder).model.get("first_stage") or {})
    if requested == "codes" and not has_codes:
        raise ConfigError(f"The first stage of {folder} has no codebook, so it has no codes; encode --as latents.")
    return requested or ("codes" if has_codes else "latents")


def latents(
    first_stage: FirstStage,
    index: ShardIndex,
    spec: ImageSpec,
    dtype: str = "float32",
    flip: bool = False,
    batch_size: int = 64,
    missing_budget: float = 0.0,
    keep_images: bool = False,
) -> Samples:
    """Encode every image of a set of shards as the mean and log variance of its posterior; see `_encoded`.

    The tensors are `mean` and, unless the posterior is deterministic, `logvar` `[C, h, w]`.

    Args:
        first_stage: in eval mode, on its device.
        index: open shards with images.
        spec: how the images are decoded.
        dtype: `float32`, or `float16` at half the size.
        flip: encode the mirror images too, as `mean_flipped` and `logvar_flipped`.
        batch_size: images that are encoded at a time.
        missing_budget: share of the samples whose image may be missing or unreadable.
        keep_images: copy the images, too: an alignment reads them beside the latents.

    Returns:
        A row for each sample; left out: `unreadable`.

    Raises:
        DataError: more unreadable images than the budget allows.
        RunError: a latent that is not finite, or that the dtype does not hold.
    """

    def encode(field: str, stage: FirstStage, pixels_B3SS: Tensor) -> dict[str, Tensor]:
        posterior = stage.encode(to_signed(pixels_B3SS))
        tensors = {"mean": posterior.mean, "logvar": posterior.logvar}
        stored = {name: value.float().cpu().to(DTYPES[dtype]) for name, value in tensors.items() if value is not None}
        for name, value in stored.items():
            if not value.isfinite().all():
                hint = " float16 holds nothing above 65,504: encode with --dtype float32." if dtype == "float16" else ""
                raise RunError(f"The first stage returned a {name} that is not finite in {dtype}.{hint}")
        return stored

    kept = (*KEPT, *IMAGE_EXTENSIONS) if keep_images else KEPT
    return _encoded({FIRST_STAGE: first_stage}, encode, index, spec, flip, batch_size, missing_budget, kept)


def codes(
    first_stage: FirstStage,
    index: ShardIndex,
    spec: ImageSpec,
    flip: bool = False,
    batch_size: int = 64,
    missing_budget: float = 0.0,
    map_stage: FirstStage | None = None,
) -> Samples:
    """Encode every image of a set of shards as codes; see `_encoded`.

    The tensors are `codes` `[h, w]`, uint16, or uint32 for larger codebooks: two bytes a code, where a latent takes
    four for each of its channels.

    Args:
        first_stage: with a codebook, in eval mode, on its device.
        index, spec, batch_size, missing_budget: as for `latents`.
        flip: encode the mirror images too, as `codes_flipped`.
        map_stage: encodes the images' maps, as `map_codes`; None leaves them out.

    Returns:
        A row for each sample; left out: `unreadable`.

    Raises:
        ConfigError: a first stage without a codebook.
        DataError: more unreadable images than the budget allows.
    """
    stages = {FIRST_STAGE: first_stage, **({} if map_stage is None else {MAP_STAGE: map_stage})}
    for stage in stages.values():
        if not isinstance(stage, VQAutoencoder):
            raise ConfigError(f"{type(stage).__name__} has no codebook, so it has no codes; encode --as latents.")

    def encode(field: str, stage: Any, pixels_B3SS: Tensor) -> dict[str, Tensor]:
        dtype = torch.uint16 if stage.quantizer.codes <= SMALL else torch.uint32
        latents = finite(stage.encode(to_signed(pixels_B3SS)).mean, "The first stage's latents have")
        indices = stage.quantizer.indices(latents)
        return {"codes" if field == FIRST_STAGE else "map_codes": indices.cpu().to(dtype)}

    return _encoded(stages, encode, index, spec, flip, batch_size, missing_budget)


def _encoded(
    stages: dict[str, FirstStage],
    encode: Encode,
    index: ShardIndex,
    spec: ImageSpec,
    flip: bool,
    batch_size: int,
    missing_budget: float,
    kept: Sequence[str] = KEPT,
) -> Samples:
    """Encode every image of a set of shards, in its order.

    A sample keeps its text, its class and its record, to which the hashes of the stages and the decoding of the
    image are added; `safetensors` with the encoder's tensors replaces the image, unless that is kept.

    Args:
        stages: record's field → first stage, of the images and, if there is a second one, of their maps.
        encode: encodes a batch; the rest as for `latents`.
        kept: members that are copied.
    """
    made_by = {field: content_hash(stage) for field, stage in stages.items()}
    keep_freed_memory()
    tally = Tally()
    samples = _readable(index, spec, tally, int(missing_budget * len(index)), maps=MAP_STAGE in stages)
    while rows := list(islice(samples, batch_size)):
        tensors: dict[str, Tensor] = {}
        for n, (field, stage) in enumerate(stages.items()):
            pixels = torch.stack([images[n] for _, _, images in rows]).to(stage.latent_mean.device)
            for ending in ("", "_flipped") if flip else ("",):
                with torch.no_grad():
                    made = encode(field, stage, pixels.flip(-1) if ending else pixels)
                tensors |= {name + ending: value for name, value in made.items()}
        for n, (key, members, _) in enumerate(rows):
            own: dict[str, Any] = {name: members[name] for name in kept if name in members}
            record = {**parse_record(members), **made_by, ENCODED_AS: spec.form}
            data = save({name: value[n].contiguous() for name, value in tensors.items()})
            yield key, {**own, "json": record, LATENTS: data}
            tally.written += 1
    return tally


def _readable(
    index: ShardIndex, spec: ImageSpec, tally: Tally, allowed: int, maps: bool
) -> Iterator[tuple[str, dict[str, bytes], list[Tensor]]]:
    """Yield (key, members, uint8 `[3, S, S]` of the image, and with `maps` of its map) of each readable sample.

    Args:
        index: open shards with images.
        spec: how images are decoded.
        tally: counts the others as `unreadable`.
        allowed: how many of them there may be.
        maps: whether the map is needed, too.

    Raises:
        DataError: more are unreadable.
    """
    for i, key in enumerate(index.keys):
        try:
            with sample_errors():
                members = index.read(i, (*IMAGE_EXTENSIONS, *KEPT, *((MAP,) if maps else ())))
                data = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
                if data is None:
                    raise SampleError("no-picture", "it has no image")
                parse_record(members)
                images = [decode_image(data, spec), *([map_of(members, spec)] if maps else [])]
        except SampleError as error:
            tally.leave_out("unreadable", f"sample {key}: {error}")
            if (lost := tally.left_out["unreadable"]) > allowed:
                raise DataError(
                    f"{index.root}: sample {key} cannot be encoded ({error}); {lost} are lost and the"
                    f" missing budget allows {allowed}."
                ) from error
            continue
        yield str(key), members, images
