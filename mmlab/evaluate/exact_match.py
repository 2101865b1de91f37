"""Exact match: the score of questions whose answer is a word or two."""

from collections.abc import Sequence

from mmlab.evaluate.scores import Reference, Row, Scores, rows_of, share


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
