"""easy-VQA: 64 px pictures of one coloured shape each, with yes/no and open questions."""

import json
import re
from pathlib import Path

from mmlab.config.errors import ConfigError, DataError, nearest
from mmlab.data.shards import Samples

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
SPLITS = ("train", "val", "test")


def easy_vqa(root: str | Path, split: str = "train", held_out: int = 0) -> Samples:
    """Read the raw data set; a sample is a picture with all of its questions and the caption that they give
    away.

    Args:
        root: the folder that holds `easy_vqa/data`, or that folder itself.
        split: `train`, `test`, or `val`, which is held out of the training pictures.
        held_out: every how many-th training picture belongs to `val`; 0 holds none out.

    Returns:
        Counts: `samples`, `questions`, `partial_caption` (the questions tell only colour or only shape),
        `without_caption` (they tell neither).

    Raises:
        ConfigError: an unknown split, or `val` with nothing held out.
        DataError: no such data, a malformed question, questions that contradict each other, a missing
            picture.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split '{split}' of easy-VQA; known: {', '.join(SPLITS)}.{nearest(split, SPLITS)}")
    if split == "val" and held_out < 2:
        raise ConfigError("easy-VQA has no val split of its own; hold one out, such as --held-out 20.")
    folder = _folder(Path(root)) / ("test" if split == "test" else "train")
    counts: dict[str, int] = dict.fromkeys(("samples", "questions", "partial_caption", "without_caption"), 0)
    for number, questions in sorted(_load_questions(folder).items()):
        if split != "test" and held_out > 1 and (number % held_out == 0) != (split == "val"):
            continue
        picture = folder / "images" / f"{number}.png"
        if not picture.is_file():
            raise DataError(f"{folder / 'questions.json'} asks about picture {number}, but there is no {picture}.")
        colour, shape = known_from(questions, f"{folder / 'questions.json'}, picture {number}")
        name = f"{split}-{number:05d}"
        record = {"id": name, "questions": questions}
        if colour or shape:
            record["caption"] = " ".join(filter(None, ("a", colour, shape or "shape")))
        counts["samples"] += 1
        counts["questions"] += len(questions)
        counts["partial_caption"] += (colour is None) != (shape is None)
        counts["without_caption"] += colour is None and shape is None
        yield name, {"png": picture.read_bytes(), "json": record}
    return counts


def known_from(questions: list[dict[str, str]], where: str = "") -> tuple[str | None, str | None]:
    """What a picture's questions and answers say about the colour and the shape of its one object.

    An open question names what it does not ask for ("what is the blue shape?"); a yes/no question tells what
    is there if its answer and its negation agree ("is no blue shape present?" — "no").

    Raises:
        DataError: two questions say different things.
    """
    found: dict[tuple[str, ...], set[str]] = {COLOURS: set(), SHAPES: set()}
    for entry in questions:
        question, answer = entry["question"], entry["answer"]
        says_there_is = True
        if entry["type"] == "yesno":
            negated = re.search(r"\b(no|not)\b", question) is not None
            says_there_is = (answer == "yes") != negated
        for options, values in found.items():
            named = set(re.findall(r"[a-z]+", question)) | {answer}
            values |= named & set(options) if says_there_is else set()
    for values in found.values():
        if len(values) > 1:
            raise DataError(f"{where}: the questions contradict each other ({' and '.join(sorted(values))}).")
    colours, shapes = found.values()
    return next(iter(colours), None), next(iter(shapes), None)


def _folder(root: Path) -> Path:
    for folder in (root / "easy_vqa" / "data", root / "data", root):
        if (folder / "train" / "questions.json").is_file():
            return folder
    raise DataError(f"there is no easy-VQA in {root}: easy_vqa/data/train/questions.json is looked for.")


def _load_questions(folder: Path) -> dict[int, list[dict[str, str]]]:
    """Picture number → its questions, in the file's order."""
    path = folder / "questions.json"
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    pictures: dict[int, list[dict[str, str]]] = {}
    for number, entry in enumerate(entries):
        match entry:
            case [str(question), str(answer), int(picture)]:
                pictures.setdefault(picture, []).append(
                    {"question": question, "answer": answer, "type": _type(answer, f"{path}, entry {number}")}
                )
            case _:
                raise DataError(f"{path}, entry {number}: expected [question, answer, picture number].")
    return pictures


def _type(answer: str, where: str) -> str:
    for kind, answers in (("yesno", ("yes", "no")), ("color", COLOURS), ("shape", SHAPES)):
        if answer in answers:
            return kind
    raise DataError(f"{where}: answer '{answer}' is neither yes/no nor a known colour or shape.")
