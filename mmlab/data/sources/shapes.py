"""Synthetic scenes of shapes with captions, boxes, questions and dialogues: any amount of data from a seed.

Each question has exactly one right answer in its image. Yes and no are equally likely for every yes/no question;
the other types keep their priors (a color is one of eight, most counts are small). The class of a scene is the kind
of its leftmost shape.
"""

import io
import random
from collections.abc import Iterator, Sequence
from typing import Any

from mmlab.config.errors import ConfigError, nearest
from mmlab.data.formats import Members
from mmlab.data.shard_files import Samples
from mmlab.data.sources.scenes import COLORS, KINDS, SIZES, Shape, draw, place
from mmlab.data.tally import Tally

Question = dict[str, str]
TYPES = ("color", "shape", "count", "position", "yesno")
"""Types of questions."""


def shapes(
    count: int,
    split: str = "train",
    seed: int = 0,
    size: int = 64,
    min_objects: int = 1,
    max_objects: int = 3,
    kinds: Sequence[str] = KINDS,
    sizes: Sequence[str] = SIZES,
    types: Sequence[str] = TYPES,
    single_types: Sequence[str] = (),
) -> Samples:
    """Draw `count` scenes. Scene i depends only on (seed, split, i) and the other options, never on `count`.

    Args:
        count: number of samples.
        split: a name such as `train` or `val`; each has different samples.
        seed: each gives a different data set.
        size: side of the square images in pixels.
        min_objects: fewest objects in a scene.
        max_objects: most objects in a scene, at most 4.
        kinds: the shapes that occur in scenes and questions.
        sizes: of the objects: `small`, `large` or both.
        types: of questions; the others are left out, and the scenes stay as they are.
        single_types: those that are asked only about scenes with a single object.

    Returns:
        A row for each scene; `objects`, `questions`.

    Raises:
        ConfigError: an option out of range.
    """
    if count < 1 or size < 16 or not 1 <= min_objects <= max_objects <= 4:
        raise ConfigError("shapes need count >= 1, size >= 16 and 1 <= min_objects <= max_objects <= 4.")
    choices = {
        "kinds": (kinds, KINDS),
        "sizes": (sizes, SIZES),
        "types": (types, TYPES),
        "single_types": (single_types, TYPES),
    }
    for name, (chosen, options) in choices.items():
        if not chosen and name != "single_types":
            raise ConfigError(f"{name} cannot be empty; options: {', '.join(options)}.")
        for one in chosen:
            if one not in options:
                raise ConfigError(f"{name} can be {', '.join(options)}, not '{one}'.{nearest(one, options)}")
    asked = types, [name for name in types if name not in single_types]
    tally = Tally("objects", "questions")
    for i in range(count):
        name = f"{split}-{i:07d}"
        with tally.row(name):
            rng = random.Random(f"{seed}/{split}/{i}")
            scene = place(rng, rng.randint(min_objects, max_objects), kinds, sizes)
            members, questions = _sample(name, rng, scene, size, kinds, asked)
            tally.details.update(objects=len(scene), questions=len(questions))
            yield name, members
    return tally


def _sample(
    name: str,
    rng: random.Random,
    scene: list[Shape],
    size: int,
    kinds: Sequence[str],
    asked: tuple[Sequence[str], Sequence[str]],
) -> tuple[Members, list[Question]]:
    """A drawn scene; `asked` are the types of questions about a single object, and about several."""
    png = io.BytesIO()
    draw(scene, size, rng).save(png, "PNG")
    questions = [question for question in ask(scene, rng, kinds) if question["type"] in asked[len(scene) > 1]]
    record: dict[str, Any] = {
        "id": name,
        "caption": caption(scene),
        "class": scene[0].kind,
        "boxes": [{"category": f"{s.color} {s.kind}", "box": [round(edge, 4) for edge in s.box]} for s in scene],
    }
    if questions:
        record |= {"questions": questions, "conversations": dialogue(questions, rng)}
    return {"png": png.getvalue(), "json": record}, questions


def caption(scene: list[Shape]) -> str:
    """Name the objects from left to right: "a red circle, a black star and a small blue square"."""
    names = [article(str(shape)) for shape in scene]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def ask(scene: list[Shape], rng: random.Random, kinds: Sequence[str] = KINDS) -> Iterator[Question]:
    """Yield questions with one right answer in this scene: at most one of each type, but a yes and a no."""
    yield from _about_one(scene, rng)
    yield _count(scene, rng, kinds)
    yield from _position(scene, rng)
    yesno = [_exists(scene, rng, kinds, answer) for answer in ("yes", "no")]
    rng.shuffle(yesno)
    yield from yesno


def dialogue(questions: list[Question], rng: random.Random) -> list[dict[str, str]]:
    """A conversation of two or three turns, from questions of different types, that opens with the image.

    It takes only one of the two yes/no questions: the answer to one would reveal the other's.
    """
    by_type = {question["type"]: question for question in questions}
    chosen = rng.sample(list(by_type.values()), min(len(by_type), rng.randint(2, 3)))
    turns = []
    for number, question in enumerate(chosen):
        turns.append({"from": "human", "value": ("<image>\n" if number == 0 else "") + question["question"]})
        turns.append({"from": "gpt", "value": question["answer"]})
    return turns


def _about_one(scene: list[Shape], rng: random.Random) -> Iterator[Question]:
    """The color of an object whose shape is unique in the scene, and the shape of one whose color is."""
    kinds, colors = [s.kind for s in scene], [s.color for s in scene]
    by_kind = [s for s in scene if kinds.count(s.kind) == 1]
    if by_kind:
        s = rng.choice(by_kind)
        yield {"question": f"what color is the {s.kind}?", "answer": s.color, "type": "color"}
    by_color = [s for s in scene if colors.count(s.color) == 1]
    if by_color:
        s = rng.choice(by_color)
        yield {"question": f"what shape is the {s.color} object?", "answer": s.kind, "type": "shape"}


def _count(scene: list[Shape], rng: random.Random, kinds: Sequence[str]) -> Question:
    if rng.random() < 0.5:
        return {"question": "how many objects are there?", "answer": str(len(scene)), "type": "count"}
    if rng.random() < 0.5:
        kind = rng.choice([*(s.kind for s in scene), rng.choice(kinds)])
        return {
            "question": f"how many {kind}{'es' if kind.endswith('s') else 's'} are there?",
            "answer": str(sum(s.kind == kind for s in scene)),
            "type": "count",
        }
    color = rng.choice([*(s.color for s in scene), rng.choice(list(COLORS))])
    return {
        "question": f"how many {color} objects are there?",
        "answer": str(sum(s.color == color for s in scene)),
        "type": "count",
    }


def _position(scene: list[Shape], rng: random.Random) -> Iterator[Question]:
    """The position of one object relative to another, if one direction is clearly dominant."""
    pairs = []
    for a in scene:
        for b in scene:
            dx, dy = a.x - b.x, a.y - b.y
            if a is not b and max(abs(dx), abs(dy)) > 1.6 * min(abs(dx), abs(dy)):
                answer = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("below" if dy > 0 else "above")
                pairs.append((a, b, answer))
    if pairs:
        a, b, answer = rng.choice(pairs)
        question = f"where is the {a.color} {a.kind} relative to the {b.color} {b.kind}?"
        yield {"question": question, "answer": answer, "type": "position"}


def _exists(scene: list[Shape], rng: random.Random, kinds: Sequence[str], answer: str) -> Question:
    """Ask for a shape, a color, or both; the object is uniform for both answers, so the question gives nothing away."""
    form = rng.choice(("kind", "color", "both"))
    there = {"kind": {s.kind for s in scene}, "color": {s.color for s in scene}}.get(form, set())
    names = {"kind": list(kinds), "color": list(COLORS)}.get(form, [])
    if options := [name for name in names if (name in there) == (answer == "yes")]:
        thing = rng.choice(options) + (" object" if form == "color" else "")
    else:  # also if the scene has every kind, where only a color can make the answer no
        pairs = {(s.color, s.kind) for s in scene}
        others = [(color, kind) for color in COLORS for kind in kinds if (color, kind) not in pairs]
        thing = " ".join(rng.choice(sorted(pairs) if answer == "yes" else others))
    return {"question": f"is there {article(thing)}?", "answer": answer, "type": "yesno"}


def article(name: str) -> str:
    """A name with its article: "an orange star"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
