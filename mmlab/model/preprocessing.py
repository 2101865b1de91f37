"""How images are prepared for an encoder. Legend: N images, H/W pixels."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.utils.hub import cached_file

from mmlab.config.errors import ConfigError

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
"""CLIP's statistics of values in [0, 1], red, green and blue."""
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
FILE = "preprocessor_config.json"


def read_preprocessor(source: str) -> dict[str, Any]:
    """Return a checkpoint's settings of its image processor; none if it has no such file.

    Args:
        source: hub name or local folder.

    Raises:
        ConfigError: the file cannot be read, or its images are prepared in a way that is not available here.
    """
    for name in (FILE, "processor_config.json"):
        path = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is None:
            continue
        try:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
            settings = settings if name == FILE else settings.get("image_processor", {})
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}.") from error
        if settings.get("do_flip_channel_order"):
            raise ConfigError(f"{path}: do_flip_channel_order=true (blue first) is not available; images are RGB.")
        return settings
    return {}


def statistics(settings: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return (mean, std) by which values in [0, 1] are normalized: those of `read_preprocessor`, or CLIP's."""
    if settings.get("do_normalize") is False:
        return [0.0] * 3, [1.0] * 3
    return settings.get("image_mean") or CLIP_MEAN, settings.get("image_std") or CLIP_STD


def pixels_of(settings: dict[str, Any]) -> int | None:
    """Return the side in pixels of what an image processor gives, or None."""
    for name in ("crop_size", "size"):
        size = settings.get(name)
        sides = size.values() if isinstance(size, dict) else [size]
        if numbers := [side for side in sides if isinstance(side, int)]:
            return min(numbers)
    return None


def resized(pixels_N3HW: Tensor, size: int) -> Tensor:
    """Square uint8 images, resized by bicubic interpolation with antialiasing."""
    if pixels_N3HW.shape[-1] == size:
        return pixels_N3HW
    scaled = interpolate(pixels_N3HW.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return scaled.round().clamp(0, 255).to(torch.uint8)
