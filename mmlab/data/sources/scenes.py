"""Scenes of shapes: placing objects without overlap, and drawing them. Lengths are in sides of the image."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (40, 90, 210),
    "yellow": (245, 205, 30),
    "orange": (250, 130, 20),
    "purple": (130, 60, 170),
    "brown": (125, 75, 45),
    "black": (25, 25, 25),
}
KINDS = ("circle", "square", "triangle", "diamond", "star", "cross")
SIZES = ("small", "large")
_RADII = {"small": (0.09, 0.11), "large": (0.16, 0.19)}
_SUPERSAMPLING = 4
_CLEAR = 0.03  # least distance between two objects, and from the edge
_ORDER = 0.06  # least difference of two objects' x, so that their order from left to right is clear


@dataclass(frozen=True)
class Shape:
    """An object of a scene: center and radius in sides of the image, y downwards."""

    color: str
    kind: str
    size: str
    x: float
    y: float
    radius: float

    def __str__(self) -> str:
        """Its name in a caption, which states the size of small objects."""
        return f"small {self.color} {self.kind}" if self.size == "small" else f"{self.color} {self.kind}"

    @property
    def corners(self) -> list[tuple[float, float]]:
        """Outline of a shape with corners."""
        angles: list[tuple[float, float]]  # (degrees clockwise from the top, share of the radius)
        match self.kind:
            case "square":
                angles = [(45 + 90 * i, 1.1) for i in range(4)]
            case "diamond":
                angles = [(90 * i, 1.0 if i % 2 == 0 else 0.7) for i in range(4)]
            case "triangle":
                angles = [(120 * i, 1.1) for i in range(3)]
            case "star":
                angles = [(36 * i, 1.1 if i % 2 == 0 else 0.45) for i in range(10)]
            case _:
                arm, length = 0.3, 1.0
                steps = [
                    (-arm, -length),
                    (arm, -length),
                    (arm, -arm),
                    (length, -arm),
                    (length, arm),
                    (arm, arm),
                ]
                steps += [(-dx, -dy) for dx, dy in steps]
                return [(self.x + self.radius * dx, self.y + self.radius * dy) for dx, dy in steps]
        return [
            (
                self.x + self.radius * r * math.sin(math.radians(a)),
                self.y - self.radius * r * math.cos(math.radians(a)),
            )
            for a, r in angles
        ]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The tight bounding box x1, y1, x2, y2."""
        if self.kind == "circle":
            return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius
        xs, ys = zip(*self.corners, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


def place(rng: random.Random, count: int, kinds: Sequence[str] = KINDS, sizes: Sequence[str] = SIZES) -> list[Shape]:
    """Draw `count` objects that do not overlap and differ in color or kind, sorted from left to right."""
    while True:
        scene: list[Shape] = []
        for _ in range(50 * count):
            size = rng.choice(sizes)
            radius = rng.uniform(*_RADII[size])
            low, high = 1.1 * radius + _CLEAR, 1 - 1.1 * radius - _CLEAR
            x, y = rng.uniform(low, high), rng.uniform(low, high)
            new = Shape(rng.choice(list(COLORS)), rng.choice(kinds), size, x, y, radius)
            if all(_apart(new, old) for old in scene):
                scene.append(new)
            if len(scene) == count:
                return sorted(scene, key=lambda shape: shape.x)


def draw(scene: list[Shape], size: int, rng: random.Random) -> Image.Image:
    """Draw a scene on a light ground of a random tint, antialiased, as an RGB image of `size` x `size`."""
    ground = tuple(rng.randint(225, 255) for _ in range(3))
    side = size * _SUPERSAMPLING
    picture = Image.new("RGB", (side, side), ground)
    pen = ImageDraw.Draw(picture)
    for shape in scene:
        if shape.kind == "circle":
            pen.ellipse([edge * side for edge in shape.box], fill=COLORS[shape.color])
        else:
            pen.polygon([(x * side, y * side) for x, y in shape.corners], fill=COLORS[shape.color])
    return picture.resize((size, size), Image.Resampling.BOX)


def _apart(a: Shape, b: Shape) -> bool:
    if (a.color, a.kind) == (b.color, b.kind) or abs(a.x - b.x) < _ORDER:
        return False
    return math.hypot(a.x - b.x, a.y - b.y) > 1.1 * (a.radius + b.radius) + _CLEAR
