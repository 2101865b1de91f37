"""diffusers' VQModel as our VQ autoencoder, weight by weight. Legend: C channels of latents."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmlab.model.checkpoint_files import read_json
from mmlab.model.diffusers_source import INDEX, Place, pipeline_of, place_of, read_model
from mmlab.model.diffusers_vae import stated_statistics

CODEBOOK = "quantize.embedding.weight"
DEFAULTS: dict[str, Any] = {
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "mid_block_add_attention": True,
}
"""Of an architecture's fields, in diffusers and here."""


@dataclass(frozen=True)
class StoredVQ:
    """A VQModel: what our autoencoder of the same architecture states of itself, its weights, and, if it states them,
    mean and standard deviation `[C]` of its latents."""

    config: Mapping[str, Any]
    weights: dict[str, Tensor]
    statistics: tuple[Tensor, Tensor] | None


def vq_place(source: str) -> Place:
    """Return where a VQ autoencoder is: the source, or a part of this pipeline."""
    return place_of(source, ("vqvae", "vae"), "first_stage", "a VQ autoencoder")


def read_vq(source: str) -> StoredVQ:
    """Read a VQModel; raises ConfigError if it is none, or cannot be read.

    Its statistics are its `scaling_factor`, or those that a pipeline written by `mmlab export` has.
    """
    from diffusers.models.autoencoders.vq_model import VQModel

    place = vq_place(source)
    place.config("VQModel")
    model, fields = read_model(VQModel, place)
    weights = dict(model.state_dict())
    weights["quantizer.codebook"] = weights.pop(CODEBOOK)
    codes, width = weights["quantizer.codebook"].shape
    names = (*DEFAULTS, "block_out_channels", "latent_channels", "down_block_types", "up_block_types")
    config = {**{name: fields[name] for name in names}, "codes": codes, "width": width, "normalize": False}
    return StoredVQ(config, weights, stated_statistics({**fields, **_of_pipeline(source)}, width))


def _of_pipeline(source: str) -> dict[str, Any]:
    """Return the statistics that a pipeline states beside its parts."""
    pipeline = pipeline_of(source)
    path = None if pipeline is None else pipeline.find(INDEX)
    fields = (path and read_json(path)) or {}
    return {name: fields[name] for name in ("latents_mean", "latents_std") if fields.get(name) is not None}


def buffers_of(module: torch.nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the stored buffers of a module that are not among the weights of a checkpoint."""
    names = dict(module.named_buffers())
    return {name: value for name, value in module.state_dict().items() if name in names and name not in weights}
