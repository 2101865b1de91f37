"""ScienceQA's score: the letter that a reply settles on, by LLaVA's published rules.

The rules are those of LLaVA's `eval_science_qa.py`, to the letter, so that a published model gets its published number:
nothing is stripped, and what follows "The answer is X" may be any character of the same line, a full stop or not.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmlab.config.errors import DataError
from mmlab.data.sources.scienceqa import COLUMNS, LETTERS, Problem
from mmlab.evaluate.scores.score import Reference, Row, Scores, rows_of, share

FAILED = -1
"""The index of a reply that settles on nothing, as LLaVA's result files have it."""

_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def letter_of(text: str) -> str | None:
    """The letter that a reply settles on, whether it is among the choices or not; None where there is none.

    A bare letter; else the letter of a leading "X. "; else that of the one "The answer is X." there is.
    """
    if text in tuple(LETTERS):
        return text
    if text[:1] in tuple(LETTERS) and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


def extract(text: str, choices: int) -> int:
    """The place of the choice that a reply settles on, from 0; `FAILED` for none, or a letter that is no choice.

    Args:
        text: the reply.
        choices: how many there are.
    """
    letter = letter_of(text)
    return LETTERS.index(letter) if letter and letter in LETTERS[:choices] else FAILED


def scienceqa(predictions: Sequence[str | None], references: Sequence[Reference]) -> Scores:
    """Accuracy, in all and in ScienceQA's eight columns; what has no letter is wrong, and counted as `failed`.

    Raises:
        DataError: a reference whose answer is no letter of its choices.
    """
    chosen = [FAILED if p is None else extract(p, r.choices) for p, r in zip(predictions, references, strict=True)]
    right = [index == _right(reference) for index, reference in zip(chosen, references, strict=True)]

    def row(places: list[int]) -> Row:
        missing = sum(predictions[n] is None for n in places)
        return {
            "questions": len(places),
            "accuracy": share(sum(right[n] for n in places), len(places)),
            "correct": sum(right[n] for n in places),
            "failed": sum(chosen[n] == FAILED for n in places) - missing,
            "missing": missing,
        }

    return Scores(*rows_of(references, row, COLUMNS), [float(ok) for ok in right])


def reference_of(problem: Problem) -> Reference:
    """What a reply to a problem is compared with."""
    return Reference(problem.id, (problem.letter,), problem.columns, problem.id, len(problem.choices))


def result_layout(predictions: Sequence[str | None], references: Sequence[Reference]) -> dict[str, Any]:
    """The replies and their indices as LLaVA's result files hold them: `{acc, correct, count, results, outputs}`.

    A reply that is missing is the text "FAILED" there.
    """
    outputs = {r.key: "FAILED" if p is None else p for p, r in zip(predictions, references, strict=True)}
    results = {r.key: extract(outputs[r.key], r.choices) for r in references}
    correct = sum(results[r.key] == _right(r) for r in references)
    share_of_all = 100 * correct / len(references)
    return {"acc": share_of_all, "correct": correct, "count": len(references), "results": results, "outputs": outputs}


def differences(
    predictions: Sequence[str | None], references: Iterable[Reference], recorded: Mapping[str, int]
) -> dict[str, int]:
    """How our indices compare with recorded ones.

    Older result files hold an index drawn at random where a reply settles on nothing: those differ, though no letter
    was read differently.

    Returns:
        Counts: `compared`, `differ`, and of these `differ_with_letter`, where our rules do find a choice.
    """
    counts = {"compared": 0, "differ": 0, "differ_with_letter": 0}
    for text, reference in zip(predictions, references, strict=True):
        if text is None or reference.key not in recorded:
            continue
        ours = extract(text, reference.choices)
        counts["compared"] += 1
        counts["differ"] += ours != recorded[reference.key]
        counts["differ_with_letter"] += ours not in (recorded[reference.key], FAILED)
    return counts


def _right(reference: Reference) -> int:
    answer = reference.answers[0] if reference.answers else ""
    if len(answer) != 1 or answer not in LETTERS[: reference.choices]:
        raise DataError(
            f"question {reference.key}: metric=scienceqa compares letters, and the right answer {answer!r} is none of"
            f" its {reference.choices} choices; shards need a `reference`, as mmlab shards build scienceqa writes it."
        )
    return LETTERS.index(answer)
