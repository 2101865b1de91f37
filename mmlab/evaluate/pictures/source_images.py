"""Image files to start from, and masks of what is drawn of them. Legend: N images, S side."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.data.images import decode_image, decoding, size_in
from mmlab.data.sample_types import ImageSpec, SampleError

IMAGE, MASK = "source_image", "source_mask"
"""Inputs of a diffusion model's generator beside those of the conditioner."""


def source_images(images: Sequence[str], masks: Sequence[str], count: int, spec: ImageSpec) -> dict[str, Tensor]:
    """Inputs of the generator for `count` images, each drawn from one of the images with its mask, in turn.

    Args:
        images: files.
        masks: files as large as the images: white is drawn, black is kept. One for each image, one for all, or none.
        count: N.
        spec: how images become squares of the model's size.

    Returns:
        `IMAGE`, uint8 `[N, 3, S, S]`, and with masks `MASK`, bool `[N, 1, S, S]`; nothing without images.

    Raises:
        ConfigError: a file that is not an image, a mask of another size or number, or one in which nothing is white.
    """
    pixels = [read_image(f"image={name}", name, spec) for name in images]
    drawn = [_mask(name, images[n], spec) for n, name in enumerate(_one_each(masks, images))]
    several = {IMAGE: pixels, MASK: drawn}
    return {key: torch.stack([one[n % len(one)] for n in range(count)]) for key, one in several.items() if one}


def read_image(what: str, path: str | int, spec: ImageSpec) -> Tensor:
    """The image in a file, uint8 `[3, S, S]`; raises ConfigError, beginning with `what`, if it cannot be read."""
    try:
        return decode_image(_file(path).read_bytes(), spec)
    except (OSError, SampleError) as error:
        raise ConfigError(f"{what} cannot be read: {error}.") from error


def _one_each(masks: Sequence[str], images: Sequence[str]) -> list[str]:
    if len(masks) > 1 and len(masks) != len(images):
        raise ConfigError(f"mask has {len(masks)} files and image {len(images)}; give one mask for each image, or one.")
    return [masks[0]] * len(images) if len(masks) == 1 else list(masks)


def _mask(name: str, image: str, spec: ImageSpec) -> Tensor:
    """What is drawn of an image, bool `[1, S, S]`."""
    mask = read_image(f"mask={name}", name, spec).float().mean(0, keepdim=True) >= 128
    sizes = [_size(path) for path in (name, image)]
    if sizes[0] != sizes[1]:
        own, other = (f"{width} x {height}" for width, height in sizes)
        raise ConfigError(f"mask={name} has {own} pixels, and image={image} {other}; a mask is as large as its image.")
    if not mask.any():
        raise ConfigError(f"mask={name} has nothing white where the model looks, and white is what it draws.")
    return mask


def _size(path: str) -> tuple[int, int]:
    data = _file(path).read_bytes()
    with decoding(data):
        return size_in(data)


def _file(path: str | int) -> Path:
    return Path(str(path)).expanduser()
