"""diffusers' AutoencoderKL: its fields, its folders, and what they say about the latents. Legend: C latent channels."""

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError, nearest
from mmlab.model.checkpoint import on_meta

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

NOT_ARCHITECTURE = ("sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
"""Fields of a diffusers AutoencoderKL that its weights do not depend on."""


def build_kl(source: str | None, init: str, architecture: Mapping[str, Any]) -> "AutoencoderKL":
    """Build an AutoencoderKL with random weights or load it; arguments as for `KLAutoencoder`."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    if init == "random" or on_meta():
        known = [name for name in inspect.signature(AutoencoderKL.__init__).parameters if name != "self"]
        # diffusers' default is Stable Diffusion's factor, which is wrong for every other autoencoder.
        fields = {"scaling_factor": 1.0, **with_blocks(architecture, known)}
        with sizes_that_fit():
            return AutoencoderKL(**fields)
    if source is None:
        raise ConfigError(
            "model.first_stage.source is not set; give a hub name or a folder, or set model.first_stage.init=random."
        )
    return read_kl(source)


def read_kl(source: str) -> "AutoencoderKL":
    """Load an AutoencoderKL from the hub or a folder: fp32, from safetensors alone, whole; else ConfigError."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        loaded: Any = AutoencoderKL.from_pretrained(source, torch_dtype=torch.float32, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.first_stage.source={source} is no AutoencoderKL that can be loaded: {reason}"
        ) from error
    vae, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"{source} does not fill model.first_stage: {len(missing)} weights are missing, as {missing[0]}."
        )
    return vae


def stated_statistics(config: Mapping[str, Any], channels: int) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation `[C]` of raw latents that a diffusers config states, or None.

    Pipelines normalise with (z - shift_factor) · scaling_factor, or (z - latents_mean) / latents_std ·
    scaling_factor where there are such.
    """
    stated = [config.get(name) for name in ("latents_mean", "latents_std", "shift_factor")]
    scaling = config.get("scaling_factor") or 1.0
    if scaling == 1.0 and stated == [None] * 3:
        return None
    mean, std, shift = stated
    mean_C = torch.tensor(mean if mean is not None else [shift or 0.0] * channels, dtype=torch.float64)
    std_C = torch.tensor(std if std is not None else [1.0] * channels, dtype=torch.float64) / scaling
    return mean_C.float(), std_C.float()


def with_blocks(architecture: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Return the fields, checked, with a plain block per width where no blocks are named; raises ConfigError."""
    known = list(known)
    for name in architecture:
        if name not in known:
            raise ConfigError(f"model.first_stage.architecture has no field '{name}'.{nearest(name, known)}")
    widths = architecture.get("block_out_channels")
    if not widths or not isinstance(widths, Sequence):
        raise ConfigError("model.first_stage.architecture needs block_out_channels, a list of the width of each level.")
    depth = len(architecture["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * depth, "up_block_types": ["UpDecoderBlock2D"] * depth}
    fields = {**blocks, **architecture}
    for name in blocks:
        if len(fields[name]) != depth:
            raise ConfigError(
                f"model.first_stage.architecture: {name} has {len(fields[name])} blocks, block_out_channels {depth}."
            )
    return fields


@contextmanager
def sizes_that_fit() -> Iterator[None]:
    """Turn diffusers' complaints about sizes into ConfigError."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"model.first_stage.architecture does not fit together: {error}.") from error
