"""UNets of diffusers checkpoints, for the latents and conditions of a model. Legend: C channels, K classes, D width."""

from typing import Any

import torch
from torch import Tensor, nn

from mmlab.config.errors import ConfigError
from mmlab.model.diffusers_source import Place, place_of, read_model, readable
from mmlab.weights import fill

KINDS = ("UNet2DConditionModel", "UNet2DModel")
CLASS_TABLE = "class_embedding.weight"
FOREIGN = {
    "addition_embed_type": "pooled texts and image sizes, as in Stable Diffusion XL",
    "encoder_hid_dim_type": "a projected context",
    "time_cond_proj_dim": "the guidance scale, as distilled models do",
    "timestep_post_act": "another time embedding",
}
"""Fields of UNets that need more than a time, a vector and a context → what that is."""


def unet_place(source: str) -> Place:
    """Return where a UNet is: the source, or a part of this pipeline."""
    return place_of(source, ("unet", "denoiser"), "denoiser", "a UNet")


def empty_unet(source: str, channels: int, vector_width: int | None, context_width: int | None) -> nn.Module:
    """Build a checkpoint's UNet on the meta device; `fill_unet` fills it.

    A UNet that adds embeddings of classes to its time embedding gets them from the conditioner.

    Args:
        source: of the settings.
        channels: C of the latents.
        vector_width: width of the condition's vector, None for a condition without one.
        context_width: width of the condition's context, likewise.

    Raises:
        ConfigError: a source that cannot be read, or a UNet for other latents or conditions.
    """
    place = unet_place(source)
    fields = place.config(*KINDS)
    _check(place, fields, channels, vector_width, context_width)
    own = {"class_embed_type": None if vector_width is None else "identity", "num_class_embeds": None}
    with readable(place), torch.device("meta"):
        return _kind(fields).from_config({**fields, **own})


def fill_unet(unet: nn.Module, source: str) -> None:
    """Fill a UNet of `empty_unet` from its source, without embeddings of classes; raises ConfigError."""
    place = unet_place(source)
    weights = dict(read_model(_kind(place.config(*KINDS)), place)[0].state_dict())
    weights.pop(CLASS_TABLE, None)
    fill(unet, weights, source)


def unet_classes(source: str) -> Tensor | None:
    """Return the embeddings of classes that a checkpoint's UNet adds to its time embedding, `[K + 1, D]`, or None."""
    place = unet_place(source)
    fields = place.config(*KINDS)
    if fields.get("num_class_embeds") is None or fields.get("class_embed_type") is not None:
        return None
    return read_model(_kind(fields), place)[0].state_dict()[CLASS_TABLE]


def _kind(fields: dict[str, Any]) -> Any:
    from diffusers.models.unets.unet_2d import UNet2DModel  # importing diffusers takes seconds
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DModel if fields.get("_class_name") == "UNet2DModel" else UNet2DConditionModel


def _check(
    place: Place, fields: dict[str, Any], channels: int, vector_width: int | None, context_width: int | None
) -> None:
    """Refuse a UNet that takes or gives something else than the model has."""
    what = f"{place.key}={place}"
    for name, described in FOREIGN.items():
        if fields.get(name) is not None:
            raise ConfigError(f"{what} is conditioned on {described} ({name}={fields[name]}), which is not supported.")
    for name in ("in_channels", "out_channels"):
        if (theirs := fields.get(name, channels)) != channels:
            raise ConfigError(
                f"{what} has {name}={theirs}, but the first stage has latents of {channels} channels; take "
                "model.first_stage.source from the same pipeline, and a UNet that predicts from latents alone."
            )
    kind = fields.get("class_embed_type")
    if kind not in (None, "identity"):
        raise ConfigError(f"{what} is conditioned on a {kind} (class_embed_type={kind}), which is not supported.")
    if vector_width is None and (kind or fields.get("num_class_embeds") is not None):
        raise ConfigError(
            f"{what} is conditioned on a class, but the conditioner has no vector; set model/conditioner=class."
        )
    theirs = fields.get("cross_attention_dim", 1280) if _kind(fields).__name__ == KINDS[0] else None
    if theirs is not None and context_width is None:
        raise ConfigError(
            f"{what} attends to a context of width {theirs}, but the conditioner has none; set "
            f"model/conditioner=pretrained model.conditioner.source={place.root}."
        )
    if theirs is None and context_width is not None:
        raise ConfigError(f"{what} attends to no context; set model/conditioner=none, or class for a vector.")
    if theirs != context_width:
        raise ConfigError(
            f"{what} attends to a context of width {theirs}, but the conditioner's is {context_width}; set "
            f"model.conditioner.source={place.root}."
        )
