"""easy-VQA: 64 px images of one colored shape each, with yes/no and open questions."""

import re
from pathlib import Path

from mmlab.config.errors import ConfigError, DataError, nearest
from mmlab.data.building import Rows
from mmlab.data.dialogues import check_sample
from mmlab.data.formats import Members
from mmlab.data.sample_types import SampleError
from mmlab.data.sources.files import load_json
from mmlab.data.sources.pictures import ImageFolder
from mmlab.data.tally import Tally

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
SPLITS = ("train", "val", "test")


def easy_vqa(root: str | Path, split: str = "train", held_out: int = 0) -> Rows:
    """Read the raw data set; a sample is an image with all of its questions and the caption that they imply.

    Args:
        root: the folder that holds `easy_vqa/data`, or that folder itself.
        split: `train`, `test`, or `val`, which is held out of the training images.
        held_out: every n-th training image belongs to `val`; 0 holds none out.

    Returns:
        A row for each image with questions; `questions`, `partial_caption` (they imply only color or only shape),
        `without_caption` (they imply neither). Left out: `other split`, and what `ImageFolder.read` names.

    Raises:
        ConfigError: an unknown split, or `val` with nothing held out.
        DataError: no such data, a malformed question, questions that contradict each other, a missing image.
    """
    if split not in SPLITS:
        raise ConfigError(f"easy-VQA has no split '{split}'.{nearest(split, SPLITS)} Options: {', '.join(SPLITS)}.")
    if split == "val" and held_out < 2:
        raise ConfigError("easy-VQA has no val split of its own; hold one out, for example with --held-out 20.")
    folder = _folder(Path(root)) / ("test" if split == "test" else "train")
    tally = Tally("questions", "partial_caption", "without_caption")
    images = ImageFolder(folder / "images")
    pictures = sorted(_load_questions(folder).items())
    entries = ((f"{folder / 'questions.json'}, image {number}", (number, asked)) for number, asked in pictures)

    def convert(where: str, entry: tuple[int, list[dict[str, str]]], tally: Tally) -> tuple[str, Members] | None:
        number, questions = entry
        with tally.row(where):
            if split != "test" and held_out > 1 and (number % held_out == 0) != (split == "val"):
                raise SampleError("other split", f"With --held-out {held_out} it is not of the split {split}.")
            picture = images.read(f"{number}.png", where, tally)
            color, shape = implied_by(questions, where)
            name = f"{split}-{number:05d}"
            record = {"id": name, "questions": questions}
            if color or shape:
                record["caption"] = " ".join(filter(None, ("a", color, shape or "shape")))
            check_sample(record, ["questions"], 1)
            tally.details["questions"] += len(questions)
            tally.details["partial_caption"] += (color is None) != (shape is None)
            tally.details["without_caption"] += color is None and shape is None
            return name, {picture.extension: picture.data, "json": record}

    return Rows(entries, convert, tally)


def implied_by(questions: list[dict[str, str]], where: str = "") -> tuple[str | None, str | None]:
    """(color, shape) of an image's one object, as far as its questions and answers imply them.

    An open question names the one that it does not ask for ("what is the blue shape?"); a yes/no question implies
    what is there if its answer and its negation agree ("is no blue shape present?" — "no").

    Raises:
        DataError: two questions contradict each other.
    """
    implied: dict[tuple[str, ...], set[str]] = {COLORS: set(), SHAPES: set()}
    for entry in questions:
        question, answer = entry["question"], entry["answer"]
        says_there_is = True
        if entry["type"] == "yesno":
            negated = re.search(r"\b(no|not)\b", question) is not None
            says_there_is = (answer == "yes") != negated
        for options, values in implied.items():
            named = set(re.findall(r"[a-z]+", question)) | {answer}
            values |= named & set(options) if says_there_is else set()
    for values in implied.values():
        if len(values) > 1:
            raise DataError(f"{where}: the questions contradict each other ({' and '.join(sorted(values))}).")
    colors, shapes = implied.values()
    return next(iter(colors), None), next(iter(shapes), None)


def _folder(root: Path) -> Path:
    for folder in (root / "easy_vqa" / "data", root / "data", root):
        if (folder / "train" / "questions.json").is_file():
            return folder
    raise DataError(f"there is no easy-VQA in {root}: it has no easy_vqa/data/train/questions.json.")


def _load_questions(folder: Path) -> dict[int, list[dict[str, str]]]:
    """Image number → its questions, in the file's order."""
    path = folder / "questions.json"
    entries = load_json(path)
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of [question, answer, image number].")
    pictures: dict[int, list[dict[str, str]]] = {}
    for number, entry in enumerate(entries):
        match entry:
            case [str(question), str(answer), int(picture)]:
                pictures.setdefault(picture, []).append(
                    {"question": question, "answer": answer, "type": _type(answer, f"{path}, entry {number}")}
                )
            case _:
                raise DataError(f"{path}, entry {number}: expected [question, answer, image number].")
    return pictures


def _type(answer: str, where: str) -> str:
    for kind, answers in (("yesno", ("yes", "no")), ("color", COLORS), ("shape", SHAPES)):
        if answer in answers:
            return kind
    raise DataError(f"{where}: answer '{answer}' is neither yes/no nor one of its colors or shapes.")
