"""Synthetic scenes of one object with dialogues of LLaVA's three response types, and the facts of each answer."""

import io
import random
from collections.abc import Iterator, Sequence
from typing import Any

from mmlab.config.errors import ConfigError, nearest
from mmlab.data.formats import RESPONSE_TYPES
from mmlab.data.shard_files import Samples
from mmlab.data.sources.scenes import COLORS, KINDS, Shape, draw, place
from mmlab.data.sources.shapes import article, caption
from mmlab.data.tally import Tally

DESCRIBE = ("Describe the picture in detail.", "What is in the picture? Tell me everything.", "Explain what you see.")
_CORNERS = {"circle": 0, "square": 4, "triangle": 3, "diamond": 4, "star": 10, "cross": 12}

Question = tuple[str, str, tuple[str, ...]]
"""Question, answer, and the facts of the answer."""


def instructions(
    count: int,
    types: Sequence[str] = RESPONSE_TYPES,
    split: str = "train",
    seed: int = 0,
    size: int = 64,
    kinds: Sequence[str] = KINDS,
) -> Samples:
    """Draw `count` scenes with a dialogue each, of the response types in turn.

    Scene and dialogue i depend on (seed, split, i), the type and the other options. The record has the dialogue in
    `conversations`, and each of its turns, with its facts as `answers`, in `questions`.

    Args:
        count: number of samples.
        types: response types, of `RESPONSE_TYPES`.
        split: a name such as `train` or `val`; each has different samples.
        seed: each gives a different data set.
        size: side of the square images in pixels.
        kinds: the shapes that occur.

    Returns:
        A row for each scene; `questions`.

    Raises:
        ConfigError: an option out of range, an unknown type or shape.
    """
    if count < 1 or size < 16:
        raise ConfigError("instructions need count >= 1 and size >= 16.")
    for what, names, options in (("types", types, RESPONSE_TYPES), ("kinds", kinds, KINDS)):
        if not names:
            raise ConfigError(f"{what} cannot be empty; options: {', '.join(options)}.")
        for name in names:
            if name not in options:
                raise ConfigError(f"{what} can be {', '.join(options)}, not '{name}'.{nearest(name, options)}")
    tally = Tally("questions")
    for i in range(count):
        kind = types[i % len(types)]
        name = f"{split}-{kind}-{i:07d}"
        with tally.row(name):
            rng = random.Random(f"{seed}/{split}/{i}")
            scene = place(rng, 1, kinds)
            png = io.BytesIO()
            draw(scene, size, rng).save(png, "PNG")
            record = _record(name, scene[0], kind, rng)
            tally.details["questions"] += len(record["questions"])
            yield name, {"png": png.getvalue(), "json": record}
    return tally


def _record(name: str, shape: Shape, kind: str, rng: random.Random) -> dict[str, Any]:
    asks = list(_ask(shape, kind, rng))
    turns: list[dict[str, str]] = []
    for number, (question, answer, _) in enumerate(asks):
        turns.append({"from": "human", "value": ("<image>\n" if number == 0 else "") + question})
        turns.append({"from": "gpt", "value": answer})
    questions = [{"question": q, "answer": a, "answers": list(facts), "type": kind} for q, a, facts in asks]
    return {"id": name, "type": kind, "caption": caption([shape]), "conversations": turns, "questions": questions}


def _ask(shape: Shape, kind: str, rng: random.Random) -> Iterator[Question]:
    if kind == "conversation":
        yield from _conversation(shape, rng)
    elif kind == "detail_description":
        where = f"{'top' if shape.y < 0.5 else 'bottom'} {'left' if shape.x < 0.5 else 'right'}"
        answer = f"There is one object. It is a {shape.size} {shape.kind}. Its color is {shape.color}. "
        facts = (shape.size, shape.kind, shape.color, *where.split())
        yield rng.choice(DESCRIBE), f"{answer}It is at the {where} of the picture.", facts
    else:
        yield _reasoning(shape, rng)


def _conversation(shape: Shape, rng: random.Random) -> Iterator[Question]:
    """Two or three short questions, in any order."""
    color, kind = shape.color, shape.kind
    other = rng.choice([name for name in COLORS if name != color])
    there = rng.random() < 0.5
    options = [
        (f"what color is the {kind}?", color),
        (f"what shape is the {color} object?", kind),
        ("is the object small or large?", shape.size),
        (f"is there {article(color if there else other)} object?", "yes" if there else "no"),
        ("is it on the left or on the right?", "left" if shape.x < 0.5 else "right"),
    ]
    for question, answer in rng.sample(options, rng.randint(2, 3)):
        yield question, answer, (answer,)


def _reasoning(shape: Shape, rng: random.Random) -> Question:
    """A question whose answer follows from the image, with the reasoning."""
    form = rng.randrange(3)
    if form == 0:
        corners = _CORNERS[shape.kind]
        why = f"The object is a {shape.kind}. A {shape.kind} has {corners} corners."
        return _concluded("How many corners does the object have?", why, str(corners), (shape.kind,))
    if form == 1:
        wall = rng.choice((shape.color, rng.choice(list(COLORS))))
        same = wall == shape.color
        why = f"The object is {shape.color}. On {wall} one {'cannot' if same else 'can'} see it."
        question = f"Can one see the object on {article(wall)} wall?"
        return _concluded(question, why, "no" if same else "yes", (shape.color,))
    rolls = shape.kind == "circle"
    why = f"The object is a {shape.kind}. A {shape.kind} is {'round' if rolls else 'not round'}."
    return _concluded("Does the object roll down a hill?", why, "yes" if rolls else "no", (shape.kind,))


def _concluded(question: str, why: str, answer: str, seen: tuple[str, ...]) -> Question:
    return question, f"{why} The answer is {answer}.", (*seen, f"The answer is {answer}")
