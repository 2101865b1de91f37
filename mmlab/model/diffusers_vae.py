"""diffusers' AutoencoderKL: building, reading, and statistics of latents. Legend: C latent channels."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError, nearest
from mmlab.model.config import KLAutoencoderConfig
from mmlab.model.diffusers_source import Place, place_of, read_model, readable, reads_config
from mmlab.model.pretrained import on_meta, require_source

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

NOT_ARCHITECTURE = ("sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
"""Fields of a diffusers AutoencoderKL that its weights do not depend on."""


def build_kl(settings: KLAutoencoderConfig) -> "AutoencoderKL":
    """Build an AutoencoderKL with random weights, or on the meta device, to be filled from the source."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    if settings.init == "random" or (settings.source is None and on_meta()) or not reads_config(settings):
        names = [name for name in inspect.signature(AutoencoderKL.__init__).parameters if name != "self"]
        # diffusers' default is Stable Diffusion's factor, which is wrong for every other autoencoder.
        fields = {"scaling_factor": 1.0, **with_blocks(settings.architecture, names)}
        with sizes_that_fit():
            return AutoencoderKL(**fields)
    place = kl_place(require_source(settings, "first_stage"))
    fields: Any = place.config("AutoencoderKL")
    with readable(place), torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(fields)
        return vae.eval()


def kl_place(source: str) -> Place:
    """Return where an AutoencoderKL is: the source, or a part of this pipeline."""
    return place_of(source, ("vae", "vqvae"), "first_stage", "an AutoencoderKL")


def read_kl(source: str) -> "AutoencoderKL":
    """Load an AutoencoderKL from the hub or a folder; see `read_model`."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae: Any = read_model(AutoencoderKL, kl_place(source))[0]
    return vae


def stated_statistics(config: Mapping[str, Any], channels: int) -> tuple[Tensor, Tensor] | None:
    """Return mean and standard deviation `[C]` of raw latents that a diffusers config states, or None.

    Pipelines normalize with (z - shift_factor) · scaling_factor, or (z - latents_mean) / latents_std · scaling_factor
    where the config has these.
    """
    stated = [config.get(name) for name in ("latents_mean", "latents_std", "shift_factor")]
    scaling = config.get("scaling_factor") or 1.0
    if scaling == 1.0 and stated == [None] * 3:
        return None
    mean, std, shift = stated
    mean_C = torch.tensor(mean if mean is not None else [shift or 0.0] * channels, dtype=torch.float64)
    std_C = torch.tensor(std if std is not None else [1.0] * channels, dtype=torch.float64) / scaling
    return mean_C.float(), std_C.float()


def with_blocks(architecture: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the fields with a plain block for each width where no blocks are named.

    Raises:
        ConfigError: a field that is not among `names`, no widths, or another number of blocks than of widths.
    """
    names = list(names)
    for name in architecture:
        if name not in names:
            raise ConfigError(f"model.first_stage.architecture has no field '{name}'.{nearest(name, names)}")
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
    """Turn the errors of diffusers about sizes into ConfigError."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"model.first_stage.architecture does not fit together: {error}.") from error
