"""The scores by name (`metric=…`), and the two short ones: exact match and facts."""

import re
from collections.abc import Sequence

from mmlab.config.errors import ConfigError, nearest
from mmlab.evaluate.scores.caption_scores import captions
from mmlab.evaluate.scores.scienceqa_score import scienceqa
from mmlab.evaluate.scores.score import Reference, Row, Scorer, Scores, rows_of, share
from mmlab.evaluate.scores.vqa import vqa
from mmlab.evaluate.scores.yes_no import mme, pope


def normalise(answer: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(answer.lower().split()).rstrip(".").strip()


def matches(prediction: str, answer: str) -> bool:
    """Whether a prediction is the answer, apart from case, spaces and a full stop at the end."""
    return normalise(prediction) == normalise(answer)


def exact(predictions: Sequence[str | None], references: Sequence[Reference]) -> Scores:
    """Share of predictions that match an answer, in all and per type; a missing one matches none."""
    pairs = zip(predictions, references, strict=True)
    each = [float(p is not None and any(matches(p, answer) for answer in r.answers)) for p, r in pairs]

    def row(places: list[int]) -> Row:
        return {"accuracy": share(sum(each[n] for n in places), len(places)), "questions": len(places)}

    return Scores(*rows_of(references, row), each)


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


SCORERS: dict[str, Scorer] = {
    "exact": exact,
    "vqa": vqa,
    # GQA's accuracy is exact match, as its evaluation splits it: by form, by meaning, and binary or open.
    "gqa": exact,
    "pope": pope,
    "mme": mme,
    "scienceqa": scienceqa,
    "captions": captions,
    "facts": facts,
}


def scorer_named(name: str) -> Scorer:
    """The scorer of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SCORERS:
        raise ConfigError(f"metric '{name}' is not one of {', '.join(SCORERS)}.{nearest(name, SCORERS)}")
    return SCORERS[name]
