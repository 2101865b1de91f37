"""Pictures varied at random in training, by the sample's seed. Legend: S side of the square."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmlab.data.images import PAD_COLOR
from mmlab.keyed import draw

LEAST = 0.7  # of the area


def cropped(image: Tensor, seed: int) -> Tensor:
    """A square of 70 to 100 % of the area of a uint8 image `[3, S, S]`, resized to S; for texts about the whole."""
    whole = image.shape[-1]
    side, top, left = _square(whole, seed, "crop")
    return _resized(image[:, top : top + side, left : left + side], whole)


def placed(image: Tensor, seed: int) -> Tensor:
    """A uint8 image `[3, S, S]` at 70 to 100 % of its area, at a random place in a square of the padding's color.

    Nothing is cut off or mirrored, so counts, and what is left of or above what, stay as the questions say.
    """
    whole = image.shape[-1]
    side, top, left = _square(whole, seed, "place")
    square = torch.tensor(PAD_COLOR, dtype=torch.uint8)[:, None, None].repeat(1, whole, whole)
    square[:, top : top + side, left : left + side] = _resized(image, side)
    return square


def _square(whole: int, seed: int, name: str) -> tuple[int, int, int]:
    """Side, top and left of a random square in a larger one."""
    side = round(whole * (LEAST + (1 - LEAST) * draw(seed, f"{name}/area")) ** 0.5)
    top, left = (int(draw(seed, f"{name}/{axis}") * (whole - side + 1)) for axis in "yx")
    return side, top, left


def _resized(image: Tensor, side: int) -> Tensor:
    part = image[None].float()
    resized = F.interpolate(part, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].round().clamp(0, 255).to(torch.uint8)
