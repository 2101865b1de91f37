"""ScienceQA: its files, the columns of its scores, and its questions in the form of LLaVA."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, DataError, nearest
from mmlab.data.building import Rows
from mmlab.data.dialogues import check_sample
from mmlab.data.formats import Members
from mmlab.data.sample_types import SampleError
from mmlab.data.sources.files import load_json
from mmlab.data.sources.pictures import ImageFolder
from mmlab.data.tally import Tally
from mmlab.data.turns import IMAGE

LETTERS = "ABCDE"
PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
GRADES = tuple(f"grade{number}" for number in range(1, 13))
COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
"""Subjects; problems with a text, with an image, with neither; grades (ScienceQA, arXiv 2209.09513, table 4)."""


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: its key in `problems.json`.
        question: its text.
        choices: two to five answers, one of which is right.
        answer: position of the right one, from 0.
        hint: the text that it is about, or empty.
        image: the file of the image that it is about, or None.
        lecture, solution: the reasoning, each possibly empty.
        subject, grade: as in the file.
        split: its part of the data set; also the folder that its image is in.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    image: str | None
    lecture: str
    solution: str
    subject: str
    grade: str
    split: str

    @property
    def letter(self) -> str:
        """The right answer's letter."""
        return LETTERS[self.answer]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it counts in; a problem with a text and an image counts in TXT and in IMG."""
        context = [name for name, there in (("TXT", self.hint), ("IMG", self.image)) if there] or ["NO"]
        grade = "G1-6" if GRADES.index(self.grade) < 6 else "G7-12"
        return (SUBJECTS[self.subject], *context, grade)


def load_problems(path: str | Path) -> dict[str, Problem]:
    """Read `problems.json`: id → problem, in the file's order.

    Raises:
        DataError: no such file, another layout, or a malformed problem (with its id).
    """
    entries = _object(Path(path), "{problem id: {question, choices, answer, …}}")
    return {name: _problem(name, entry, f"{path}, problem {name}") for name, entry in entries.items()}


def load_split(path: str | Path | None, split: str, problems: dict[str, Problem]) -> list[Problem]:
    """The problems of a split, in its order.

    Args:
        path: `pid_splits.json`; None takes the `split` of each problem.
        split: such as `train`, `val`, `test`, `minival`.
        problems: all of them.

    Raises:
        DataError: no such file or split, or a split that names a problem twice or one that does not exist.
    """
    if path is None:
        splits: dict[str, Any] = {}
        for problem in problems.values():
            splits.setdefault(problem.split, []).append(problem.id)
    else:
        splits = _object(Path(path), "{split: [problem id, …]}")
        if other := [name for name, ids in splits.items() if not isinstance(ids, list)]:
            raise DataError(f"{path} does not hold {{split: [problem id, …]}}: '{other[0]}' is not a list.")
    if split not in splits:
        raise DataError(f"there is no split '{split}'; there are {', '.join(splits)}.{nearest(split, splits)}")
    names = splits[split]
    seen: set[str] = set()
    for name in map(str, names):
        if name not in problems:
            raise DataError(f"{path}: split '{split}' names problem {name}, which {PROBLEMS} does not have.")
        if name in seen:
            raise DataError(f"{path}: split '{split}' names problem {name} twice.")
        seen.add(name)
    return [problems[str(name)] for name in names]


def _object(path: Path, layout: str) -> dict[str, Any]:
    entries = load_json(path)
    if not isinstance(entries, dict) or not entries:
        raise DataError(f"{path} does not hold {layout}.")
    return entries


def _problem(name: str, entry: Any, where: str) -> Problem:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object, not {type(entry).__name__}.")
    choices = entry.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: its choices are not a list of texts.")
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"{where}: it has {len(choices)} choices, not two to {len(LETTERS)}.")
    answer = entry.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{where}: answer {answer!r} is not the position of one of its {len(choices)} choices.")
    texts = {field: _text(entry, field, where) for field in ("question", "hint", "lecture", "solution", "split")}
    if not texts["question"].strip():
        raise DataError(f"{where}: the question is empty.")
    image = entry.get("image") or None
    if image is not None and not isinstance(image, str):
        raise DataError(f"{where}: an image is named by one file, not {type(image).__name__}.")
    one_of = {"subject": tuple(SUBJECTS), "grade": GRADES}
    for field, options in one_of.items():
        value = entry.get(field)
        if value not in options:
            near = nearest(str(value), options)
            raise DataError(f"{where}: {field} {value!r} is not one of {', '.join(options)}.{near}")
    return Problem(
        id=name,
        choices=tuple(choices),
        answer=answer,
        image=image,
        subject=entry["subject"],
        grade=entry["grade"],
        **texts,
    )


def _text(entry: dict[str, Any], field: str, where: str) -> str:
    value = entry.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} must be text, not {type(value).__name__}.")
    return value


FORMS = ("QCM-LEA", "QCM-ALE")
"""Question, context, multiple choice → lecture, explanation, answer (LEA), or the answer first (ALE)."""


def scienceqa(
    root: str | Path,
    split: str = "train",
    form: str = "QCM-LEA",
    captions: str | Path | None = None,
    missing_budget: float = 1.0,
) -> Rows:
    """Read the official layout: `problems.json`, `pid_splits.json`, and images in `images/<split>/<id>/<file>`.

    A problem whose image is missing, unsupported or broken becomes text alone, and is counted.

    Args:
        root: the folder of these.
        split: one of `pid_splits.json`, or of the problems if there is no such file.
        form: `QCM-LEA` reasons first, `QCM-ALE` answers first.
        captions: a JSON file of captions that are added to the context: `{"captions": {id: text}}`.
        missing_budget: share of the split's images that may be missing or unsupported.

    Returns:
        A row for each problem of the split; `with_picture`, `text_only` (problems without an image),
        what `ImageFolder.read` names (problems without their image), and with captions `captioned`. Left out: what
        training could not use, see `conversations_of`.

    Raises:
        ConfigError: an unknown form.
        DataError: a missing file or split, a malformed problem (with its id), or more losses than the budget allows.
    """
    if form not in FORMS:
        raise ConfigError(f"ScienceQA has no form '{form}'.{nearest(form, FORMS)} Options: {', '.join(FORMS)}.")
    root = Path(root)
    splits = root / SPLITS
    problems = load_split(splits if splits.exists() else None, split, load_problems(root / PROBLEMS))
    added = {} if captions is None else _captions(Path(captions))
    pictured = sum(problem.image is not None for problem in problems)
    tally = Tally("with_picture", "text_only", "missing")
    folder = _folder(root / "images", missing_budget, pictured)
    entries = ((f"{root / PROBLEMS}, problem {problem.id}", problem) for problem in problems)

    def convert(where: str, problem: Problem, tally: Tally) -> tuple[str, Members] | None:
        with tally.row(where):
            members: Members = {}
            state = "missing" if problem.image else "text_only"
            if problem.image and folder is not None:
                try:
                    picture = folder.read(f"{problem.split or split}/{problem.id}/{problem.image}", where, tally)
                    members[picture.extension] = picture.data
                    state = "with_picture"
                except SampleError as error:  # the problem stays, as text
                    state = error.reason
            entry = record(problem, form, added.get(problem.id, ""), bool(members))
            check_sample(entry, ["conversations"], len(members))
            tally.details[state] += 1
            if captions is not None:
                tally.details["captioned"] += problem.id in added
            return problem.id, members | {"json": entry}

    return Rows(entries, convert, tally, missing_budget, count=pictured)


def record(problem: Problem, form: str, caption: str = "", picture: bool = True) -> dict[str, Any]:
    """A problem as a sample's record, with the reference for a scorer."""
    question = prompt(problem, caption) + (f"\n{IMAGE}" if picture else "")
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": reply(problem, form)}]
    reference = {"answers": [problem.letter], "choices": len(problem.choices), "types": list(problem.columns)}
    return {"id": problem.id, "conversations": turns, "reference": reference}


def prompt(problem: Problem, caption: str = "") -> str:
    """Question, context and options as LLaVA's converter writes them.

    It writes a field's name before the question and then removes that name everywhere, and it has quirks with spaces
    (see `_tidied`). Both are kept: the published models were trained on such text.
    """
    context = f"{problem.hint} {caption}".strip() or "N/A"
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem.choices, strict=False))
    text = f"Question: {problem.question}\nContext: {context}\nOptions: {options}"
    return _tidied(text).replace("Question: ", "")


def reply(problem: Problem, form: str) -> str:
    """The reasoning and the answer in the order of `form`, as LLaVA's converter writes them (see `prompt`)."""
    lecture, solution = (text.replace("\\n", "\n") for text in (problem.lecture, problem.solution))
    answer = f"The answer is {problem.letter}."
    reasons = f"{lecture} {solution}"
    text = f"Answer: {reasons} {answer}" if form == "QCM-LEA" else f"Answer: {answer} BECAUSE: {reasons}"
    return _tidied(text).replace("Answer: ", "")


def _tidied(text: str) -> str:
    """Double spaces replaced once; and if the text ends with BECAUSE:, without every BECAUSE:."""
    text = text.replace("  ", " ").strip()
    return text.replace("BECAUSE:", "").strip() if text.endswith("BECAUSE:") else text


def _folder(path: Path, missing_budget: float, pictured: int) -> ImageFolder | None:
    """The images, or None if there are none and the budget allows that."""
    if path.is_dir():
        return ImageFolder(path)
    if pictured > int(missing_budget * pictured):
        raise DataError(f"there is no image folder {path}, but {pictured} problems are about an image.")
    return None


def _captions(path: Path) -> dict[str, str]:
    content = load_json(path)
    captions = content.get("captions", content) if isinstance(content, dict) else content
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise DataError(f'{path} does not hold {{"captions": {{problem id: text}}}}.')
    return captions
