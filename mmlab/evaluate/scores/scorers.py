"""Scorers by name (`metric=…`), and the two short ones: exact match and facts."""

import importlib
import re
from collections.abc import Sequence

from mmlab.config.errors import DataError
from mmlab.data.bad_samples import BadSamples
from mmlab.data.sample_types import SampleError
from mmlab.evaluate.config import SCORERS
from mmlab.evaluate.scores.score_table import Reference, Row, Scorer, Scores, rows_of, share


def scorer_named(name: str) -> Scorer:
    """The scorer of a metric, one of `METRICS`."""
    module, _, function = SCORERS[name].rpartition(".")
    return getattr(importlib.import_module(module), function)


def scorable(scorer: Scorer, references: Sequence[Reference], bad: BadSamples) -> list[int]:
    """Places of the references that a scorer can score, alone or with the others about their image.

    Args:
        scorer: raises DataError for a reference that it cannot score.
        references: at least one.
        bad: where the others are counted.

    Raises:
        DataError: it can score none of them, or fewer than the budget allows.
    """
    try:
        scorer([None] * len(references), references)
        return list(range(len(references)))
    except DataError as error:
        whole = error
    groups: dict[tuple[str, ...], list[int]] = {}
    for n, reference in enumerate(references):
        groups.setdefault((*reference.types, reference.picture), []).append(n)
    errors: dict[int, DataError] = {}
    for group in groups.values():
        for places in [[n] for n in group] + [group]:
            try:
                scorer([None] * len(places), [references[n] for n in places])
            except DataError as error:
                errors |= {n: error for n in places if len(places) == 1}
            else:
                errors = {n: error for n, error in errors.items() if n not in places}
    if len(errors) == len(references):
        raise whole
    for n, error in errors.items():
        bad.add(references[n].key, SampleError("reference", str(error)))
    return [n for n in range(len(references)) if n not in errors]


def normalized(answer: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(answer.lower().split()).rstrip(".").strip()


def matches(prediction: str, answer: str) -> bool:
    """Whether a prediction equals the answer, apart from case, spaces and a full stop at the end."""
    return normalized(prediction) == normalized(answer)


def exact(predictions: Sequence[str | None], references: Sequence[Reference]) -> Scores:
    """Share of predictions that match an answer, overall and per type; a missing one matches none."""
    pairs = zip(predictions, references, strict=True)
    each = [float(p is not None and any(matches(p, answer) for answer in r.answers)) for p, r in pairs]

    def row(places: list[int]) -> Row:
        return {"accuracy": share(sum(each[n] for n in places), len(places)), "questions": len(places)}

    return Scores(*rows_of(references, row), each)


_WORD = re.compile(r"\w+")


def says(text: str, fact: str) -> bool:
    """Whether a text contains the words of a fact, side by side, apart from case and punctuation."""
    return f" {_words(fact)} " in f" {_words(text)} "


def facts(predictions: Sequence[str | None], references: Sequence[Reference]) -> Scores:
    """Share of the answers that predictions contain, and share of predictions that contain all of theirs (`whole`).

    Each answer is a fact of one or more words. Anything else in a prediction does not count against it.
    """
    pairs = zip(predictions, references, strict=True)
    each = [0.0 if p is None else sum(says(p, fact) for fact in r.answers) / max(1, len(r.answers)) for p, r in pairs]

    def row(places: list[int]) -> Row:
        count = len(places)
        whole = share(sum(each[n] == 1 for n in places), count)
        return {"facts": share(sum(each[n] for n in places), count), "whole": whole, "questions": count}

    return Scores(*rows_of(references, row), each, "facts")


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))
