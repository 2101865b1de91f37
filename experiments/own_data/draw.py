"""Draw a data set as a user's own would be: pictures of a few objects, and LLaVA's JSON with questions about them.

    python experiments/own_data/draw.py OUT [--pictures 4000] [--test 300] [--seed 0]

OUT/images holds the pictures, OUT/train.json and OUT/test.json the records; no picture is in both. Each picture has a
caption, which says where each object is, and three records of different types (color, shape, count, relation,
existence), each with up to two questions of its type. Yes and no are equally frequent, counts nearly so, and colors and
shapes are drawn uniformly, so that an answer can hardly be guessed from the question.
"""

import argparse
import json
import math
import random
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 45, 45),
    "green": (45, 160, 65),
    "blue": (50, 85, 215),
    "yellow": (238, 204, 40),
    "purple": (142, 60, 175),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLURALS = {"cross": "crosses"}
RADII = {"small": 14, "large": 22}
SIZE = (160, 128)
SCALE = 3
TYPES = ("color", "shape", "count", "relation", "existence")
KEYS = (lambda one: one.x, lambda one: -one.x, lambda one: one.y, lambda one: -one.y)
DIRECTIONS = dict(zip(("leftmost", "rightmost", "highest", "lowest"), KEYS, strict=True))
SIDES = dict(zip(("left of", "right of", "above", "below"), KEYS, strict=True))
CLEAR = 20  # pixels between two objects whose order is asked for
REQUESTS = ("Describe the picture.", "What is in the picture?", "Write a caption for this image.")


class Thing(NamedTuple):
    size: str
    color: str
    shape: str
    x: float
    y: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


def scene(rng: random.Random) -> list[Thing]:
    """Return two to four objects that do not touch each other, and of which no two have the same color and shape."""
    things: list[Thing] = []
    count = rng.choice([2, 3, 3, 4])
    while len(things) < count:
        size = rng.choice(list(RADII))
        radius = RADII[size] + 3
        thing = Thing(
            size,
            rng.choice(list(COLORS)),
            rng.choice(SHAPES),
            rng.uniform(radius, SIZE[0] - radius),
            rng.uniform(radius, SIZE[1] - radius),
        )
        apart = all(math.dist(thing[3:], old[3:]) > radius + RADII[old.size] + 3 for old in things)
        if apart and thing.name not in [old.name for old in things]:
            things.append(thing)
    return things


def outline(thing: Thing) -> list[tuple[float, float]]:
    """Return the corners of a shape that is no circle."""
    r = RADII[thing.size]
    if thing.shape == "square":
        points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        r *= 0.85
    elif thing.shape == "triangle":
        points = [(0, -1), (0.95, 0.8), (-0.95, 0.8)]
    elif thing.shape == "star":
        radii = [1.05, 0.42] * 5
        points = [(q * math.sin(i * math.pi / 5), -q * math.cos(i * math.pi / 5)) for i, q in enumerate(radii)]
    else:
        a, b = 0.33, 1.0
        points = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a)]
        points.append((-a, -a))
    return [(thing.x + x * r, thing.y + y * r) for x, y in points]


def draw(things: list[Thing], rng: random.Random) -> Image.Image:
    """Return the picture, on a gray background of random brightness, with smooth edges."""
    gray = rng.randrange(90, 165)
    large = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), (gray, gray, gray))
    pen = ImageDraw.Draw(large)
    for thing in things:
        fill = tuple(min(255, max(0, value + rng.randrange(-15, 16))) for value in COLORS[thing.color])
        if thing.shape == "circle":
            r = RADII[thing.size]
            box = [thing.x - r, thing.y - r, thing.x + r, thing.y + r]
            pen.ellipse([value * SCALE for value in box], fill=fill)
        else:
            pen.polygon([(x * SCALE, y * SCALE) for x, y in outline(thing)], fill=fill)
    return large.resize(SIZE, Image.Resampling.LANCZOS)


def joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def place(thing: Thing) -> str:
    """Name one of nine parts of the picture."""
    row = ("top", "", "bottom")[int(3 * thing.y / SIZE[1])]
    column = ("left", "", "right")[int(3 * thing.x / SIZE[0])]
    return " ".join(filter(None, (row, column))) or "middle"


def caption(things: list[Thing]) -> str:
    """Name the objects from left to right, and where they are."""
    ordered = sorted(things, key=lambda thing: thing.x)
    return joined([f"a {thing.size} {thing.name} at the {place(thing)}" for thing in ordered])


def plural(shape: str) -> str:
    return PLURALS.get(shape, shape + "s")


def turns_of(kind: str, things: list[Thing], rng: random.Random) -> list[tuple[str, str]]:
    """Return up to two questions of a type about a picture, with their answers."""
    if kind == "color":
        shapes = [thing.shape for thing in things]
        asked = [thing for thing in things if shapes.count(thing.shape) == 1]
        turns = [(f"What color is the {thing.shape}?", f"And the {thing.shape}?", thing.color) for thing in asked]
    elif kind == "shape":
        colors = [thing.color for thing in things]
        asked = [thing for thing in things if colors.count(thing.color) == 1]
        turns = [
            (f"What shape is the {thing.color} object?", f"And the {thing.color} one?", thing.shape) for thing in asked
        ]
    elif kind == "count":
        turns = counts(things, rng)
    elif kind == "relation":
        turns = relations(things, rng)
    else:
        turns = existences(things, rng)
    rng.shuffle(turns)
    return [(later if number else first, answer) for number, (first, later, answer) in enumerate(turns[:2])]


def counts(things: list[Thing], rng: random.Random) -> list[tuple[str, str, str]]:
    """Return a question about all objects and one about a shape, a color or a size, with a drawn answer."""
    by_count: dict[int, list[str]] = {}
    groups = [(plural(shape), "shape", shape) for shape in SHAPES]
    groups += [
        (f"{value} objects", key, value) for key in ("color", "size") for value in (COLORS, RADII)[key == "size"]
    ]
    for name, key, value in groups:
        by_count.setdefault(sum(getattr(thing, key) == value for thing in things), []).append(name)
    first, second = (rng.choice(by_count[rng.choice(sorted(by_count))]) for _ in range(2))
    turns = [(f"How many {name} are there?", f"And how many {name}?", name) for name in dict.fromkeys((first, second))]
    answers = {name: str(count) for count, names in by_count.items() for name in names}
    turns = [(question, later, answers[name]) for question, later, name in turns]
    if rng.random() < 0.25:
        turns[-1] = ("How many objects are there?", "And how many objects in all?", str(len(things)))
    return turns


def relations(things: list[Thing], rng: random.Random) -> list[tuple[str, str, str]]:
    """Return a question about the outermost object in a direction, and one whether an object lies there of another."""
    turns = []
    word, key = rng.choice(list(DIRECTIONS.items()))
    first, second = sorted(things, key=key)[:2]
    if key(second) - key(first) > CLEAR:
        ask, answer = rng.choice([("What color", first.color), ("What shape", first.shape)])
        turns.append((f"{ask} is the {word} object?", f"{ask} is the {word} one?", answer))
    one, other = rng.sample(things, 2)
    answer = rng.choice(["yes", "no"])
    clear = [word for word, key in SIDES.items() if (key(other) - key(one)) * (1 if answer == "yes" else -1) > CLEAR]
    if clear:
        question = f"Is the {one.name} {rng.choice(clear)} the {other.name}?"
        turns.append((question, question, answer))
    return turns


def existences(things: list[Thing], rng: random.Random) -> list[tuple[str, str, str]]:
    """Return questions whether there is an object; half are false, and half of those have its color or its shape."""
    turns = []
    names = [thing.name for thing in things]
    for _ in range(2):
        answer = rng.choice(["yes", "no"])
        name = rng.choice(names)
        while answer == "no" and name in names:
            some, color, shape = rng.choice(things), rng.choice(list(COLORS)), rng.choice(SHAPES)
            near = [f"{some.color} {shape}", f"{color} {some.shape}"]
            name = rng.choice([*near, f"{color} {shape}", f"{color} {shape}"])
        turns.append((f"Is there a {name}?", f"Is there a {name}?", answer))
    return turns


def records_of(key: str, things: list[Thing], rng: random.Random) -> list[dict[str, object]]:
    """Return LLaVA's records about a picture: its caption, and three typed dialogues."""
    dialogues = [("caption", [(rng.choice(REQUESTS), caption(things).capitalize() + ".")])]
    for kind in rng.sample(TYPES, len(TYPES)):
        turns = turns_of(kind, things, rng)
        if turns and len(dialogues) < 4:
            dialogues.append((kind, turns))
    records = []
    for kind, turns in dialogues:
        conversations = []
        for number, (question, answer) in enumerate(turns):
            mark = "" if number else "<image>\n"
            conversations += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
        records.append({"id": f"{key}-{kind}", "image": f"{key}.jpg", "type": kind, "conversations": conversations})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", args.pictures), ("test", args.test)):
        records = []
        for number in range(count):
            rng = random.Random(f"{args.seed}/{split}/{number}")
            things, key = scene(rng), f"{split}-{number:05d}"
            draw(things, rng).save(args.out / "images" / f"{key}.jpg", quality=92)
            records += records_of(key, things, rng)
        (args.out / f"{split}.json").write_text(json.dumps(records, indent=1) + "\n")
        questions = sum(len(record["conversations"]) // 2 for record in records if record["type"] != "caption")
        print(
            f"{args.out / split}.json: {count} pictures, {len(records)} records, {questions} questions beside captions"
        )


if __name__ == "__main__":
    main()
