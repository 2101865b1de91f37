"""Shapes of about equal area for pictures that keep theirs (aspect buckets), and which shape a picture takes.

All of it is integer arithmetic, so that every machine sorts a picture into the same bucket. A shape is (height, width),
as in `mmlab sample size=`.
"""

from collections.abc import Sequence
from itertools import count, pairwise
from typing import Any

from mmlab.config.errors import ConfigError

Shape = tuple[int, int]
"""Height and width in pixels."""
MOST = 255
"""Buckets, whose numbers are bytes."""


def bucket_shapes(size: int, max_aspect: float, step: int) -> tuple[Shape, ...]:
    """The shapes of the buckets, from the tallest to the widest; the square and each shape's transpose are among them.

    The longer side goes up from `size` by `step`; the shorter side is the multiple of `step` whose area is nearest to
    `size`², as long as the longer one is at most `max_aspect` times as long.

    Raises:
        ConfigError: `size` is no multiple of `step`, `max_aspect` leaves only the square, or there are over `MOST`.
    """
    if size % step:
        raise ConfigError(f"data.size={size} must be a multiple of data.buckets.step={step}, as all sides are.")
    wide: list[Shape] = []
    for longer in count(size + step, step):
        shorter = round(size * size / longer / step) * step
        if longer > max_aspect * shorter:
            break
        wide.append((shorter, longer))
    if not wide:
        raise ConfigError(
            f"data.buckets.max_aspect={max_aspect:g} and data.buckets.step={step} leave only the square of "
            f"data.size={size}; raise the one, lower the other, or set data.buckets.max_aspect=null."
        )
    if (total := 2 * len(wide) + 1) > MOST:
        raise ConfigError(
            f"data.buckets.max_aspect={max_aspect:g} and data.buckets.step={step} make {total} buckets, of which "
            f"there may be {MOST}; raise the step."
        )
    return (*((longer, shorter) for shorter, longer in reversed(wide)), (size, size), *wide)


def shape_name(shape: Shape) -> str:
    """How reports name a bucket: height x width."""
    return f"{shape[0]}x{shape[1]}"


def bucket_of(width: Any, height: Any, shapes: Sequence[Shape]) -> Any:
    """The number of the shape whose aspect is nearest by the logarithm of their ratio; of two, the squarer one.

    Args:
        width, height: of a picture, or int64 arrays of them below 2**20; 0, 0 of an unreadable picture is the square.
        shapes: as of `bucket_shapes`, or only one.
    """
    number = 0 * width
    for (low_height, low_width), (high_height, high_width) in pairwise(shapes):
        # Wider than the geometric mean of both aspects: (width / height)² against their product.
        own, mean = width * width * (low_height * high_height), height * height * (low_width * high_width)
        tall = low_width * high_width < low_height * high_height
        number = number + ((own >= mean) if tall else (own > mean))
    return number


def covering(width: int, height: int, shape: Shape) -> tuple[int, int, int, int]:
    """Left, top, width and height of the largest centered part of a picture with the aspect of a shape."""
    rows, columns = shape
    crop_width = min(width, max(1, round(height * columns / rows)))
    crop_height = min(height, max(1, round(width * rows / columns)))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def cropped(width: int, height: int, shape: Shape) -> float:
    """The share of a picture's area that its bucket cuts off."""
    _, _, crop_width, crop_height = covering(width, height, shape)
    return 1 - crop_width * crop_height / (width * height)
