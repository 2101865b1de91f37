"""The classes that a diffusers checkpoint's denoiser embeds. Legend: K classes, D width."""

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.model.checkpoint_files import read_json
from mmlab.model.diffusers_dit import KINDS, dit_classes
from mmlab.model.diffusers_source import INDEX, pipeline_of, place_of
from mmlab.model.diffusers_unet import unet_classes


def read_classes(source: str, classes: int) -> tuple[Tensor, list[str] | None]:
    """Return (embeddings of K classes and of no class, float32 `[K + 1, D]`; the classes' names, None if unknown).

    Args:
        source: of the denoiser.
        classes: K.

    Raises:
        ConfigError: a source that cannot be read, that embeds no classes, or that has another number of them.
    """
    kind = (
        place_of(source, ("transformer", "unet", "denoiser"), "conditioner", "a denoiser").config().get("_class_name")
    )
    table = dit_classes(source) if kind in KINDS else unet_classes(source)
    if table is None:
        raise ConfigError(f"model.conditioner.source={source} embeds no classes; leave it out.")
    names = _names(source)
    count = len(table) - 1 if names is None else len(names)
    if count != classes:
        raise ConfigError(
            f"model.conditioner.source={source} has {count} classes, but model.conditioner.classes {classes}."
        )
    return torch.cat([table[:classes], table[-1:]]), names


def _names(source: str) -> list[str] | None:
    """Return the names of a pipeline's classes, in the order of their numbers."""
    pipeline = pipeline_of(source)
    path = None if pipeline is None else pipeline.find(INDEX)
    fields = (path and read_json(path)) or {}
    if isinstance(labels := fields.get("id2label"), dict):
        return [str(labels[number]) for number in sorted(labels, key=int)]
    return fields.get("classes")  # of the pipeline that `mmlab export` writes where diffusers has none
