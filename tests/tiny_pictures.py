"""Pictures for tests, as the reader decodes them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmlab.data.packing import Shown, place_pictures
from mmlab.data.sample_types import Picture


def square(pixels_3HW: Tensor, tokens: int = 0) -> Picture:
    """A picture of one square that takes `tokens` places."""
    return Picture(pixels_3HW[None], torch.arange(tokens))


def placed(starts: Sequence[tuple[int, int]], tokens: int) -> dict[str, Tensor]:
    """The `image_positions` and `image_features` of square pictures that begin at those rows and columns."""
    shown = [Shown(square(torch.zeros(3, 1, 1), tokens), row, column) for row, column in starts]
    batch = place_pictures(shown, tokens, 1)
    return {name: batch[name] for name in ("image_positions", "image_features")}
