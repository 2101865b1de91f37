"""How much of what is there a reply says: the score of long answers whose facts are known."""

import re
from collections.abc import Sequence

from mmlab.evaluate.scores import Reference, Row, Scores, rows_of, share

_WORD = re.compile(r"\w+")


def says(text: str, fact: str) -> bool:
    """Whether the words of a fact stand in a text, side by side, apart from case and marks."""
    return f" {_words(fact)} " in f" {_words(text)} "


def facts(predictions: Sequence[str | None], references: Sequence[Reference]) -> Scores:
    """Share of the references' answers that a prediction says, and of predictions that say all of theirs (`whole`).

    Each answer is a fact, a word or some. What else a prediction says is not held against it.
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
