"""Pictures of any shape as a base view and a grid of tiles (LLaVA-NeXT, https://llava-vl.github.io/blog/2024-01-30-llava-next).

Legend: S side of a tile in pixels, P features of a tile, p = sqrt(P) their rows and columns.
"""

import math
from typing import Any

import numpy as np

from mmlab.config.errors import ConfigError
from mmlab.data.config import ANYRES, ASPECTS
from mmlab.data.sample_types import NEWLINE, ImageSpec


def image_spec(model: Any, data: Any) -> ImageSpec:
    """How a vision-language model's pictures are decoded.

    Args:
        model: a `VisionLanguageModel`.
        data: settings of the data that it is trained on.

    Raises:
        ConfigError: `data.aspect=anyres` for a model without a newline, or grids that are not rows and columns.
    """
    size, tokens = model.vision.image_size, model.tokens_per_image
    if data.aspect != ANYRES:
        return ImageSpec(size, data.aspect, tokens, reduce_jpegs=data.reduce_jpegs)
    if model.newline is None:
        raise ConfigError(
            f"data.aspect={ANYRES} needs the newline of LLaVA-NeXT, which this model does not have; use "
            f"model=llava_next, or choose data.aspect from {', '.join(ASPECTS)}."
        )
    grids = [tuple(grid) for grid in data.grids]
    wrong = next((grid for grid in grids if len(grid) != 2 or min(grid) < 1), None)
    if wrong is not None or not grids:
        has = "is empty" if wrong is None else f"has {list(wrong)}"
        raise ConfigError(f"data.grids {has}; give pairs of rows and columns of tiles, such as [[1, 2], [2, 1]].")
    return ImageSpec(size, ANYRES, tokens, tuple((rows, columns) for rows, columns in grids), data.reduce_jpegs)


def best_grid(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """Rows and columns of tiles for a picture.

    The grid that keeps the most of the picture's pixels; of several, the one with the least area left unused.
    """

    def rank(grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid
        target_width, target_height = columns * spec.size, rows * spec.size
        scale = min(target_width / width, target_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - target_width * target_height

    return max(spec.grids, key=rank)


def places_of(width: int, height: int, spec: ImageSpec) -> np.ndarray:
    """Which feature each place of a picture takes, see `Picture.places`.

    First come the base view's P features. Those of the tiles follow as one image, row by row, without the rows or
    columns that are padding, and with a newline at the end of each row.

    Returns:
        int64 `[M]`.
    """
    rows, columns = best_grid(width, height, spec)
    side = math.isqrt(spec.tokens)
    tiles = np.arange(spec.tokens, spec.tokens * (1 + rows * columns))
    grid = tiles.reshape(rows, columns, side, side).transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    top, left = _padding(width, height, *grid.shape)
    grid = grid[top : grid.shape[0] - top, left : grid.shape[1] - left]
    lines = np.concatenate([grid, np.full((len(grid), 1), NEWLINE)], 1)
    return np.concatenate([np.arange(spec.tokens), lines.reshape(-1)])


def tiles_and_places(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """Tiles of a picture of that size, and the places that it takes in the sequence."""
    if spec.aspect != ANYRES:
        return 1, spec.tokens
    rows, columns = best_grid(width, height, spec)
    return 1 + rows * columns, len(places_of(width, height, spec))


def fitted_size(width: int, height: int, target_width: int, target_height: int) -> tuple[int, int]:
    """Width and height of a picture that is resized to fit into a target, its shape kept."""
    by_width, by_height = target_width / width, target_height / height
    if by_width < by_height:
        return target_width, min(math.ceil(height * by_width), target_height)
    return min(math.ceil(width * by_height), target_width), target_height


def _padding(width: int, height: int, rows: int, columns: int) -> tuple[int, int]:
    """Rows of features that are padding above (and below) a picture in a grid, and columns beside it."""
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2
