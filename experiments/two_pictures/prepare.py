"""Draw pictures of circles and squares, with questions about the circles, as shards: prepare.py OUT.

A picture has cells, each empty or with a circle or a square of about the same area, in any of four colors.
OUT/pairs: two pictures of 4 x 4 cells; which has more circles? One has k circles and the other k + 1, for each k from 1
to 8 and in either order equally often: the answers are balanced, and one picture alone says little (see `best_blind`).
OUT/scenes: one picture of 4 x 8 or 8 x 4 cells; how many circles does it have?
No picture occurs twice.
"""

import io
import random
import sys
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from mmlab.data.formats import Members
from mmlab.data.shard_files import ShardWriter

COUNTS = range(1, 10)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = ((225, 60, 55), (65, 190, 90), (90, 130, 240), (235, 205, 60))
BACKGROUND = (40, 40, 40)
CELL, SCALE = 12, 4  # pixels of a cell's side; drawn so many times larger, for smooth edges
JITTER = 1.5  # pixels that an object lies beside the middle of its cell, at most
RADIUS, HALF = 4.6, 4.1  # of a circle, and half the side of a square


class Scene(NamedTuple):
    """A picture as a PNG, and what each of its cells has."""

    png: bytes
    cells: list[str]


def draw(rng: random.Random, circles: int, rows: int, columns: int) -> Scene:
    """Draw one picture; the number of squares does not depend on that of the circles."""
    squares, cells = rng.randint(0, 5), ["nothing"] * (rows * columns)
    large = Image.new("RGB", (columns * CELL * SCALE, rows * CELL * SCALE), BACKGROUND)
    pen = ImageDraw.Draw(large)
    for n, cell in enumerate(rng.sample(range(rows * columns), circles + squares)):
        x = (cell % columns + 0.5) * CELL + rng.uniform(-JITTER, JITTER)
        y = (cell // columns + 0.5) * CELL + rng.uniform(-JITTER, JITTER)
        cells[cell], r = ("circle", RADIUS) if n < circles else ("square", HALF)
        box = [(x - r) * SCALE, (y - r) * SCALE, (x + r) * SCALE, (y + r) * SCALE]
        (pen.ellipse if n < circles else pen.rectangle)(box, fill=rng.choice(COLORS))
    file = io.BytesIO()
    large.resize((columns * CELL, rows * CELL), Image.Resampling.LANCZOS).save(file, "PNG")
    return Scene(file.getvalue(), cells)


def counts(number: int) -> tuple[int, int]:
    """Return the numbers of circles of a pair's pictures; all cases are equally frequent."""
    number, order = divmod(number, 2)
    fewer = COUNTS[number % (len(COUNTS) - 1)]
    return (fewer + 1, fewer) if order else (fewer, fewer + 1)


def best_blind(pairs: list[tuple[int, int]], hidden: int) -> float:
    """Return the best accuracy that one picture's count alone can reach on some pairs; the other one is `hidden`."""
    answers = Counter((both[1 - hidden], both[0] > both[1]) for both in pairs)
    return sum(max(answers[count, True], answers[count, False]) for count in COUNTS) / len(pairs)


def questions(first: int, second: int) -> list[dict[str, str]]:
    """The question about both pictures, and one about each, from which a model learns to count."""
    asked = (
        ("more", "which of the two has more circles?", "the first" if first > second else "the second"),
        ("first", "how many circles does the first have?", WORDS[first]),
        ("second", "how many circles does the second have?", WORDS[second]),
    )
    return [
        {"question": f"<image>\n<image>\n{question}", "answer": answer, "type": kind}
        for kind, question, answer in asked
    ]


def listing(*shown: Scene) -> list[dict[str, str]]:
    """A question that asks for the contents of all cells, row by row, from which a model learns to see."""
    cells = " and ".join(" ".join(scene.cells) for scene in shown)
    return [
        {"from": "human", "value": "\n".join(["<image>"] * len(shown)) + "\nlist the cells."},
        {"from": "gpt", "value": cells},
    ]


def new_scene(rng: random.Random, circles: int, seen: set[bytes], rows: int = 4, columns: int = 4) -> Scene:
    """Draw a picture that is not in `seen`, and add it."""
    while (digest := blake2b((scene := draw(rng, circles, rows, columns)).png).digest()) in seen:
        pass
    seen.add(digest)
    return scene


def pairs(split: str, count: int, seen: set[bytes]) -> Iterator[tuple[str, Members]]:
    """Draw pairs of pictures."""
    for number in range(count):
        rng, both = random.Random(f"pairs/{split}/{number}"), counts(number)
        first, second = (new_scene(rng, circles, seen) for circles in both)
        record = {"conversations": listing(first, second), "questions": questions(*both)}
        yield f"{number:05d}", {"png": first.png, "0.png": second.png, "json": record}


def scenes(split: str, count: int, seen: set[bytes]) -> Iterator[tuple[str, Members]]:
    """Draw wide and tall pictures, equally often; each number of circles is equally frequent, too."""
    for number in range(count):
        rng, kind = random.Random(f"scenes/{split}/{number}"), ("wide", "tall")[number % 2]
        circles = COUNTS[number // 2 % len(COUNTS)]
        scene = new_scene(rng, circles, seen, *((4, 8) if kind == "wide" else (8, 4)))
        asked = {"question": "how many circles are there?", "answer": WORDS[circles], "type": kind}
        yield f"{number:05d}", {"png": scene.png, "json": {"conversations": listing(scene), "questions": [asked]}}


def main() -> None:
    seen: set[bytes] = set()
    for name, draw_samples, sizes in (("pairs", pairs, (2880, 480)), ("scenes", scenes, (2880, 486))):
        for split, count in zip(("train", "test"), sizes, strict=True):
            with ShardWriter(Path(sys.argv[1], name, split), overwrite=True, quiet=True) as writer:
                for key, members in draw_samples(split, count, seen):
                    writer.write(key, members)
            print(f"{name}/{split}: {count:,} samples")
    alone = [best_blind([counts(n) for n in range(480)], hidden) for hidden in (1, 0)]
    print(f"best accuracy from the first or the second picture alone: {alone[0]:.2%}, {alone[1]:.2%}")


if __name__ == "__main__":
    main()
