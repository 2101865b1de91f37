"""How images are prepared for an encoder. Legend: N images, H/W pixels."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.utils.hub import cached_file

from mmlab.config.errors import ConfigError
from mmlab.model.checkpoint_files import read_json

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
"""CLIP's statistics of values in [0, 1], red, green and blue."""
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
FILE = "preprocessor_config.json"
CACHED = 2**18
"""So many float32 values fit into the cache of a core."""


def read_preprocessor(source: str) -> dict[str, Any]:
    """Return a checkpoint's settings of its image processor; none if it has no such file.

    Args:
        source: hub name or local folder.

    Raises:
        ConfigError: the file cannot be read, or its images are prepared in a way that is not available here.
    """
    for name in (FILE, "processor_config.json"):
        path = cached_file(
            os.path.expanduser(source),
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is None:
            continue
        settings = read_json(Path(path)) or {}
        if name != FILE:
            settings = settings.get("image_processor") or {}
        if settings.get("do_flip_channel_order"):
            raise ConfigError(f"{path}: do_flip_channel_order=true (blue first) is not available; images are RGB.")
        return settings
    return {}


def statistics(settings: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return (mean, std) by which values in [0, 1] are normalized: those of `read_preprocessor`, or CLIP's.

    Another scale of the pixels, and EfficientNet's second division by the deviation, are part of both.

    Raises:
        ConfigError: they are not three numbers each.
    """
    processor = str(settings.get("image_processor_type") or settings.get("feature_extractor_type"))
    if settings.get("do_normalize") is False or processor.startswith("GLPN"):
        mean, std = [0.0] * 3, [1.0] * 3
    else:
        mean = three_numbers("image_mean", settings.get("image_mean") or CLIP_MEAN)
        std = three_numbers("image_std", settings.get("image_std") or CLIP_STD)
    scale = 1 if settings.get("do_rescale") is False else settings.get("rescale_factor") or 1 / 255
    offset = 1 if settings.get("rescale_offset") else 0
    again = std if settings.get("include_top") else [1.0] * 3
    if math.isclose(scale * 255, 1) and not offset:
        return mean, [value * other for value, other in zip(std, again, strict=True)]
    return (
        [(value + offset) / scale / 255 for value in mean],
        [value * other / scale / 255 for value, other in zip(std, again, strict=True)],
    )


def three_numbers(name: str, values: Any) -> list[float]:
    """Return `image_mean` or `image_std` for red, green and blue; one number is that of all three.

    Raises:
        ConfigError: other values, or a deviation of 0.
    """
    three = list(values) if isinstance(values, list | tuple) else [values] * 3
    usable = len(three) == 3 and all(isinstance(value, int | float) and math.isfinite(value) for value in three)
    if not usable or (name == "image_std" and not all(three)):
        needed = "numbers above 0" if name == "image_std" else "numbers"
        raise ConfigError(f"model.vision.{name} is {values}; give three {needed}, for red, green and blue.")
    return three


def pixels_of(settings: dict[str, Any]) -> int | None:
    """Return the side in pixels of what an image processor gives, or None."""
    for name in ("crop_size", "size"):
        size = settings.get(name)
        sides = size.values() if isinstance(size, dict) else [size]
        if numbers := [side for side in sides if isinstance(side, int)]:
            return min(numbers)
    return None


def resized(pixels_N3HW: Tensor, size: int) -> Tensor:
    """uint8 images as squares, resized by bicubic interpolation with antialiasing."""
    if pixels_N3HW.shape[-2:] == (size, size):
        return pixels_N3HW
    scaled = interpolate(pixels_N3HW.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return scaled.round().clamp(0, 255).to(torch.uint8)


def normalized(pixels_N3HW: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels less their mean, by their deviation, in a dtype.

    Args:
        pixels_N3HW: uint8, or already float.
        mean: float32, of the same scale, such as `[3, 1, 1]`.
        std: as `mean`.
        dtype: of the result, to which float32 values are rounded.
    """
    if pixels_N3HW.device.type != "cpu":
        return ((pixels_N3HW - mean) / std).to(dtype)
    # A few pictures at a time: copies of a large batch do not fit into the cache, and may take several times as long.
    values = torch.empty(pixels_N3HW.shape, dtype=dtype)
    count = max(1, CACHED // max(1, pixels_N3HW[:1].numel()))
    for pixels, place in zip(pixels_N3HW.split(count), values.split(count), strict=True):
        place.copy_((pixels - mean).div_(std))
    return values
