"""ScienceQA's own files: `problems.json` and `pid_splits.json`, and the columns that its scores are split by."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlab.config.errors import DataError, nearest
from mmlab.data.sources.json_file import load_json

LETTERS = "ABCDE"
PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
GRADES = tuple(f"grade{number}" for number in range(1, 13))
COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
"""Subjects; problems with a text, with a picture, with neither of them; grades (ScienceQA, table 4)."""


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: its key in `problems.json`.
        question: what is asked.
        choices: two to five answers, of which one is right.
        answer: the right one's place, from 0.
        hint: the text that it is about, or empty.
        image: the file of the picture that it is about, or None.
        lecture, solution: the reasoning, each possibly empty.
        subject, grade: as in the file.
        split: its part of the data set; also the folder that its picture is in.
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
        """The columns that it counts in; a problem with a text and a picture counts in both of theirs."""
        context = [name for name, there in (("TXT", self.hint), ("IMG", self.image)) if there] or ["NO"]
        grade = "G1-6" if GRADES.index(self.grade) < 6 else "G7-12"
        return (SUBJECTS[self.subject], *context, grade)


def load_problems(path: str | Path) -> dict[str, Problem]:
    """Read `problems.json`: id → problem, in the file's order.

    Raises:
        DataError: no such file, no such layout, or a malformed problem, by its id.
    """
    entries = _object(Path(path), "{problem id: {question, choices, answer, …}}")
    return {name: _problem(name, entry, f"{path}, problem {name}") for name, entry in entries.items()}


def load_split(path: str | Path | None, split: str, problems: dict[str, Problem]) -> list[Problem]:
    """The problems of a split, in its order.

    Args:
        path: `pid_splits.json`; None takes what the problems say themselves.
        split: such as `train`, `val`, `test`, `minival`.
        problems: all of them.

    Raises:
        DataError: no such file or split, or a split that names a problem twice, or one that is not there.
    """
    if path is None:
        splits: dict[str, Any] = {}
        for problem in problems.values():
            splits.setdefault(problem.split, []).append(problem.id)
    else:
        splits = _object(Path(path), "{split: [problem id, …]}")
        if other := [name for name, ids in splits.items() if not isinstance(ids, list)]:
            raise DataError(f"{path} does not hold {{split: [problem id, …]}}: '{other[0]}' is no list.")
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
        raise DataError(f"{where}: choices are no list of texts.")
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"{where}: it has {len(choices)} choices; there are two to {len(LETTERS)}.")
    answer = entry.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{where}: answer {answer!r} is the place of none of its {len(choices)} choices.")
    texts = {field: _text(entry, field, where) for field in ("question", "hint", "lecture", "solution", "split")}
    if not texts["question"].strip():
        raise DataError(f"{where}: the question is empty.")
    image = entry.get("image") or None
    if image is not None and not isinstance(image, str):
        raise DataError(f"{where}: a picture is named by one file, not {type(image).__name__}.")
    one_of = {"subject": tuple(SUBJECTS), "grade": GRADES}
    for field, options in one_of.items():
        value = entry.get(field)
        if value not in options:
            near = nearest(str(value), options)
            raise DataError(f"{where}: {field} {value!r} is none of {', '.join(options)}.{near}")
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
        raise DataError(f"{where}: {field} is no text but {type(value).__name__}.")
    return value
