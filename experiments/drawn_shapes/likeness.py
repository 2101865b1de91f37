"""How much pictures look like drawn scenes: the closest scene with one object is drawn, and compared.

Legend: N pictures, S side in pixels. Pixels are in [0, 1], in numpy arrays `[N, S, S, 3]`.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from mmlab.data.sources.scenes import COLORS, KINDS, Shape, draw, place

SIDE = 32
_SUPERSAMPLING = 8
_PALETTE = np.array(list(COLORS.values())) / 255


@dataclass(frozen=True)
class Scenes:
    """Real scenes with one object: pixels, places of kind and color in `KINDS` and `COLORS`, and the objects."""

    pixels: np.ndarray
    kinds: np.ndarray
    colors: np.ndarray
    shapes: list[Shape]


def real_scenes(count: int, name: str) -> Scenes:
    """Draw `count` scenes of one large object; each name gives others."""
    pixels, shapes = [], []
    for n in range(count):
        rng = random.Random(f"{name}/{n}")
        scene = place(rng, 1, sizes=("large",))
        pixels.append(np.asarray(draw(scene, SIDE, rng)))
        shapes += scene
    kinds = np.array([KINDS.index(shape.kind) for shape in shapes])
    colors = np.array([list(COLORS).index(shape.color) for shape in shapes])
    return Scenes(np.stack(pixels) / np.float32(255), kinds, colors, shapes)


@dataclass(frozen=True)
class Fit:
    """The closest scene with an object of the given kind and color.

    Attributes:
        error: root mean square of the difference, per pixel of the object's area and per channel; large differences
            outside of the object count as well.
        x, y, radius: of the object, in sides of the image.
        hue: distance in RGB between the object's inner pixels and the color.
    """

    error: float
    x: float
    y: float
    radius: float
    hue: float


def fit(picture: np.ndarray, kind: int, color: int) -> Fit:
    """Fit place and size of an object to its coverage of the pixels: by moments, then by the smallest error nearby."""
    ink = _PALETTE[color]
    border = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]])
    ground = np.median(border, 0)
    cover = np.clip((picture - ground) @ (ink - ground) / np.sum((ink - ground) ** 2), 0, 1)
    firm = np.where(cover > 0.2, cover, 0)
    area = max(firm.sum(), 1e-3)
    x, y = float((firm * _COLUMNS).sum() / area), float((firm * _ROWS).sum() / area)
    radius = float(np.sqrt(area / _AREAS[KINDS[kind]])) / SIDE
    best = (np.inf, x, y, radius)
    for step in (1 / 64, 1 / 128):
        for dx, dy, dr in _MOVES:
            shape = Shape("", KINDS[kind], "", x + step * dx, y + step * dy, max(radius * (1 + 4 * step * dr), 0.02))
            shown = ground + mask(shape)[..., None] * (ink - ground)
            error = float(np.sqrt(((picture - shown) ** 2).sum() / (3 * area)))
            best = min(best, (error, shape.x, shape.y, shape.radius))
        _, x, y, radius = best
    inner = picture[cover >= min(0.9, np.quantile(cover, 0.99))].mean(0)
    return Fit(*best, hue=float(np.linalg.norm(inner - ink)))


def fits(pixels: np.ndarray, kinds: np.ndarray, colors: np.ndarray) -> list[Fit]:
    """Fit an object of each kind and color to each picture."""
    return [fit(*one) for one in zip(pixels, kinds, colors, strict=True)]


def mask(shape: Shape, side: int = SIDE) -> np.ndarray:
    """The share of each pixel that a shape covers, `[S, S]`."""
    fine = side * _SUPERSAMPLING
    image = Image.new("L", (fine, fine))
    pen = ImageDraw.Draw(image)
    if shape.kind == "circle":
        pen.ellipse([edge * fine for edge in shape.box], fill=255)
    else:
        pen.polygon([(x * fine, y * fine) for x, y in shape.corners], fill=255)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX)) / 255


_ROWS, _COLUMNS = (np.indices((SIDE, SIDE)) + 0.5) / SIDE
_MOVES = [(0, 0, 0), (1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
# Area of a shape of radius 1.
_AREAS = {kind: mask(Shape("", kind, "", 0.5, 0.5, 0.25), 128).sum() / 32**2 for kind in KINDS}
