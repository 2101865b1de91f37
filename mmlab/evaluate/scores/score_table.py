"""The table that every scorer makes of predictions and references."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlab.runs.disk import write_json

Row = dict[str, float | int | None]
"""The numbers of one row of a table by their names; None if undefined, such as a share of nothing."""

POINTS = (
    *("cider_d", "score", "perception", "cognition", "relative", "mark", "baseline_mark", "words"),
    *("perplexity", "answer_perplexity", "loss"),
)
"""Numbers that are not shares."""
BASELINES = ("blind", "question_only", "constant")
"""Scores of replies without pictures: the model's own to blank ones, the commonest answer to each question in training,
and one reply to all questions of a type."""
UNTYPED = "(none)"
"""The row of questions without a type, where others have one."""
MAIN = {"captions": "cider_d", "pope": "f1", "mme": "score", "perplexity": "perplexity"}
"""Metric → the main number of its rows, where that is not accuracy."""


@dataclass(frozen=True)
class Reference:
    """The right answers to one question.

    Attributes:
        key: its id in errors and files.
        answers: the right answers; several if several people answered or wrote captions.
        types: the rows of the table in which it counts, besides the first; see `UNTYPED`.
        picture: id of the image; questions about one image may be scored together.
        choices: number of letters to choose from; 0 for an open question.
    """

    key: str
    answers: tuple[str, ...]
    types: tuple[str, ...] = ()
    picture: str = ""
    choices: int = 0


@dataclass(frozen=True)
class Scores:
    """A table, and the score of each prediction.

    Attributes:
        all: the first row.
        types: the other rows by name, in order.
        each: score of each prediction, higher is better; 1 is entirely right (captions have no such limit).
        main: name of a row's main number.
    """

    all: Row
    types: dict[str, Row]
    each: list[float]
    main: str = "accuracy"

    def as_json(self) -> dict[str, Any]:
        """The numbers of the first row, with the other rows as `types`."""
        return {**self.all, "types": self.types}


Scorer = Callable[[Sequence[str | None], Sequence[Reference]], Scores]
"""Predictions (None if missing) and as many references → scores."""


def texts_of(entry: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The texts in a field's list; ValueError for anything else, such as one text, of which each letter would count."""
    value = entry.get(name)
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{name} must be a list, not {value!r}")
    return tuple(map(str, value or ()))


def rows_of(
    references: Sequence[Reference], row: Callable[[list[int]], Row], order: Sequence[str] | None = None
) -> tuple[Row, dict[str, Row]]:
    """The first row, and one for every type.

    Args:
        references: at least one.
        row: from indices of `references` to numbers; they are never empty, unless `order` names an absent type.
        order: the types in their order; None: those that occur, sorted.
    """
    places: dict[str, list[int]] = {}
    for n, reference in enumerate(references):
        for name in reference.types or (UNTYPED,):
            places.setdefault(name, []).append(n)
    typed = any(reference.types for reference in references)
    names = order if order is not None else sorted(places, key=lambda name: (name == UNTYPED, name)) if typed else ()
    return row(list(range(len(references)))), {name: row(places.get(name, [])) for name in names}


def share(part: float, whole: int) -> float | None:
    """A share, or None for a share of nothing."""
    return part / whole if whole else None


def cells_of(scores: dict[str, Any], main: str = "accuracy", short: bool = False) -> list[list[str]]:
    """A table of scores: the names of its columns, then a row for all questions and one for each type.

    Args:
        scores: as JSON. `BASELINES` among them are further columns with their main number, and `gain`, by how much the
            main number is higher than that of blind replies to the same questions.
        main: name of the main number.
        short: leave out the other numbers.
    """
    baselines = {name: scores[name] for name in BASELINES if scores.get(name)}
    columns = [name for name in _columns(scores) if name != "questions" and (name == main or not short)]
    gain = ["gain"] if "gain" in baselines.get("blind", {}) else []
    rows = [["", "questions", *(name.replace("_", " ") for name in [*columns, *baselines, *gain])]]
    for name, row in {"all": scores, **scores["types"]}.items():
        others = [one if row is scores else one["types"].get(name, {}) for one in baselines.values()]
        numbers = [show(column, row.get(column)) for column in columns]
        numbers += [show(main, other.get(main)) for other in others]
        numbers += [_signed(main, others[0].get("gain")) for _ in gain]
        rows.append([name, f"{row['questions']:,}", *numbers])
    return rows


def table(scores: dict[str, Any], main: str = "accuracy") -> str:
    """`cells_of` as text."""
    rows = cells_of(scores, main)
    first = max(14, *(len(row[0]) + 2 for row in rows))
    widths = [10, *(max(10, len(name) + 2) for name in rows[0][2:])]
    numbers = ["".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths, strict=True)) for row in rows]
    return "\n".join(f"{row[0]:<{first}}{line}" for row, line in zip(rows, numbers, strict=True))


def main_of(scores: Mapping[str, Any]) -> str:
    """The name of the main number of scores that were written with their `metric`."""
    return MAIN.get(str(scores.get("metric")), "accuracy")


def _signed(main: str, gain: float | None) -> str:
    return show(main, gain) if gain is None or gain < 0 else f"+{show(main, gain)}"


def show(name: str, value: float | int | None) -> str:
    """A number as text: a count, points, or a share in percent."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if name in POINTS else f"{value:.2%}"


def _columns(scores: dict[str, Any]) -> list[str]:
    names: dict[str, None] = {}
    for row in (scores, *scores["types"].values()):
        names |= {name: None for name, value in row.items() if value is None or isinstance(value, int | float)}
    return list(names)


def write_scores(folder: Path, scores: dict[str, Any]) -> Path:
    """Write `scores.json` into the folder, which is created, and return its path."""
    path = folder / "scores.json"
    write_json(path, scores, indent=2)
    return path
