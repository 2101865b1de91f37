"""Synthetic problems in ScienceQA's layout, about drawn scenes, to try the whole pipeline without its data."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, nearest
from mmlab.data.sources.scenes import COLORS, KINDS, Shape, draw, place
from mmlab.data.sources.scienceqa import LETTERS, PROBLEMS, SPLITS
from mmlab.runs.disk import write_json, writing

NAMES = ("Ann", "Ben", "Eve", "Max", "Mia", "Tom")


def write_problems(
    root: str | Path,
    counts: Mapping[str, int],
    seed: int = 0,
    size: int = 64,
    kinds: Sequence[str] = KINDS,
    own_letters: bool = False,
) -> dict[str, int]:
    """Write `problems.json`, `pid_splits.json` and `images/<split>/<id>/image.png` into a new folder.

    Problem i of a split depends only on (seed, split, i) and the other options. Of every four, one is about an image,
    one about an image and a text, one about a text, one about neither; each has two to four equally likely choices.

    Args:
        root: the folder to make.
        counts: split → number of problems.
        seed: each gives different problems.
        size: side of the images in pixels.
        kinds: the shapes that occur, at least two.
        own_letters: each color and each shape has the same letter in all problems. The choices are half of the
            colors, or all shapes (three to five), in their order; a model that is too small to find a word in a list
            can memorize such letters.

    Returns:
        Counts: `problems`, `pictures`.

    Raises:
        ConfigError: the folder is not empty, no problem is requested, or an unknown shape.
    """
    root = Path(root)
    if root.is_dir() and any(root.iterdir()):
        raise ConfigError(f"{root} is not empty; give another folder.")
    if sum(counts.values()) < 1:
        raise ConfigError("there is no problem to write; set the number of problems of at least one split.")
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"problems are about {', '.join(KINDS)}, not '{kind}'.{nearest(kind, KINDS)}")
    if len(set(kinds)) < 2:
        raise ConfigError("a problem needs two shapes to choose from.")
    if own_letters and not 3 <= len(set(kinds)) <= len(LETTERS):
        raise ConfigError(f"own_letters needs three to {len(LETTERS)} shapes, not {len(set(kinds))}.")
    problems: dict[str, Any] = {}
    splits: dict[str, list[str]] = {}
    pictures = 0
    for split, count in counts.items():
        for i in range(count):
            name = str(len(problems) + 1)
            rng = random.Random(f"{seed}/{split}/{i}")
            content = random.Random(f"{seed}/{split}/four/{i // 4}").sample(range(4), 4)[i % 4]
            problem, scene = _problem(rng, content, kinds, own_letters)
            if problem["image"]:
                folder = root / "images" / split / name
                with writing(folder):
                    folder.mkdir(parents=True)
                    draw(scene, size, rng).save(folder / "image.png")
                pictures += 1
            problems[name] = {**problem, "split": split}
            splits.setdefault(split, []).append(name)
    for file, value in ((PROBLEMS, problems), (SPLITS, splits)):
        write_json(root / file, value)
    return {"problems": len(problems), "pictures": pictures}


def _problem(
    rng: random.Random, content: int, kinds: Sequence[str], own_letters: bool
) -> tuple[dict[str, Any], list[Shape]]:
    """One problem without its split, and the scene that its image shows."""
    scene = place(rng, 1, kinds)
    texts, right, others = _content(content, scene[0], rng.choice(NAMES), kinds)
    wrong = [other for other in others if other != right]
    if own_letters:
        choices = _in_order(right, wrong)
    else:
        choices = [right, *rng.sample(wrong, rng.randint(1, min(3, len(wrong))))]
        rng.shuffle(choices)
    problem = {
        **texts,
        "choices": choices,
        "answer": choices.index(right),
        "image": "image.png" if content < 2 else None,
        "grade": f"grade{rng.randint(1, 12)}",
        "topic": "shapes",
        "category": "Seeing",
        "skill": "Name what is there",
    }
    return problem, scene


def _in_order(right: str, wrong: Sequence[str]) -> list[str]:
    """Choices in which each word always has the same place."""
    if right not in COLORS:
        return sorted([right, *wrong])
    halves = list(COLORS)[: len(COLORS) // 2], list(COLORS)[len(COLORS) // 2 :]
    half = next(half for half in halves if right in half)
    if wrong[0] in COLORS:
        return half
    # Shapes beside one color, which keeps its usual place.
    choices = sorted(wrong)[: len(LETTERS) - 1]
    choices.insert(half.index(right), right)
    return choices


def _content(kind: int, shape: Shape, name: str, kinds: Sequence[str]) -> tuple[dict[str, str], str, Sequence[str]]:
    """Texts of the problem, the right answer, and the options for wrong ones."""
    fields = ("subject", "hint", "question", "lecture", "solution")
    color, form = shape.color, shape.kind
    if kind == 0:
        why = ("Things have a color. Look at it.", f"The {form} is {color}.")
        texts, right, others = ("natural science", "", f"What color is the {form}?", *why), color, tuple(COLORS)
    elif kind == 1:
        why = ("Things have a shape. Look at the edges.", f"{name} drew a {form}.")
        task = (f"{name} drew one thing.", f"Which shape did {name} draw?")
        texts, right, others = ("social science", *task, *why), form, kinds
    elif kind == 2:
        task = (f"{name} has a {color} {form}.", f"Which color does {name} have?")
        texts, right, others = ("language science", *task, "", f"The text says {color}."), color, tuple(COLORS)
    else:
        task = ("", "Which of these is a color?")
        texts, right, others = ("natural science", *task, "", f"The word {color} names a color."), color, kinds
    return dict(zip(fields, texts, strict=True)), right, others
