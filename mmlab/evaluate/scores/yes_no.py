"""Scores of yes-or-no questions: POPE's, and MME's with pairs of questions."""

from collections.abc import Sequence

from mmlab.config.errors import DataError
from mmlab.evaluate.scores.incoherence import words_of
from mmlab.evaluate.scores.score_table import Reference, Row, Scores, rows_of, share

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def pope_answer(text: str) -> str:
    """`no` if the first sentence has the word No, no or not, else `yes`, as in POPE's evaluation."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def mme_answer(text: str) -> str:
    """`yes` or `no` if it is in the first four characters, else `other`, as in MME's evaluation."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def pope(predictions: Sequence[str | None], references: Sequence[Reference]) -> Scores:
    """Accuracy, precision, recall and F1 of "yes", and the share of "yes"; overall and per category.

    A reply with neither word counts as yes, as in POPE's evaluation; `neither` counts these, including missing replies,
    which are wrong. Published tables give F1 per category; LLaVA-1.5's number is the mean of the three.

    Raises:
        DataError: a right answer that is neither yes nor no.
    """
    replies = ["" if p is None else pope_answer(p) for p in predictions]
    true = [_truth(reference) for reference in references]
    right = [a == b for a, b in zip(replies, true, strict=True)]
    neither = [not {"yes", "no", "not"} & set(words_of(p or "")) for p in predictions]

    def row(places: list[int]) -> Row:
        hits = sum(replies[n] == true[n] == "yes" for n in places)
        yes, there = sum(replies[n] == "yes" for n in places), sum(true[n] == "yes" for n in places)
        # F1 = 2PR / (P + R), without a division by zero if there are no hits.
        return {
            "questions": len(places),
            "accuracy": share(sum(right[n] for n in places), len(places)),
            "precision": share(hits, yes),
            "recall": share(hits, there),
            "f1": share(2 * hits, yes + there),
            "yes_share": share(yes, len(places)),
            "neither": sum(neither[n] for n in places),
        }

    return Scores(*rows_of(references, row), [float(ok) for ok in right], main="f1")


def mme(predictions: Sequence[str | None], references: Sequence[Reference]) -> Scores:
    """Accuracy per task, the share of images with both answers right, and 100 times the sum of the two.

    The first row has the sums of the tasks' scores, as `perception` (at most 2,000) and `cognition` (at most 800).

    Raises:
        DataError: a right answer that is neither yes nor no, or an image without exactly two questions in its task.
    """
    replies = [mme_answer(p or "") for p in predictions]
    right = [a == _truth(reference) for a, reference in zip(replies, references, strict=True)]

    def row(places: list[int]) -> Row:
        pairs: dict[tuple[str, ...], list[bool]] = {}
        for n in places:
            pairs.setdefault((*references[n].types, references[n].picture), []).append(right[n])
        for (*_, picture), both in pairs.items():
            if len(both) != 2:
                raise DataError(f"MME asks two questions about each image, not {len(both)} about {picture}.")
        one, two = sum(right[n] for n in places) / len(places), sum(map(all, pairs.values())) / len(pairs)
        counts = {"questions": len(places), "other": sum(replies[n] == "other" for n in places)}
        return {"score": 100 * (one + two), "accuracy": one, "accuracy_plus": two, **counts}

    first, tasks = rows_of(references, row)
    order = [name for name in (*PERCEPTION, *COGNITION) if name in tasks]
    tasks = {name: tasks[name] for name in [*order, *(name for name in tasks if name not in order)]}
    sums = {"perception": _sum(tasks, PERCEPTION), "cognition": _sum(tasks, COGNITION)}
    score = _sum(tasks, tasks) if tasks else first["score"]
    return Scores({**first, "score": score, **sums}, tasks, [float(ok) for ok in right], main="score")


def _sum(tasks: dict[str, Row], names: Sequence[str] | dict[str, Row]) -> float | None:
    scores = [float(tasks[name]["score"] or 0) for name in names if name in tasks]
    return sum(scores) if scores else None


def _truth(reference: Reference) -> str:
    answer = reference.answers[0].strip().lower() if reference.answers else ""
    if answer not in ("yes", "no"):
        raise DataError(f"question {reference.key}: the right answer must be yes or no, not '{answer}'.")
    return answer
