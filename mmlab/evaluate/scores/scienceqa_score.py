"""ScienceQA's accuracy, with the answer's letter read from a reply by LLaVA's published rules.

The rules are exactly those of LLaVA's `eval_science_qa.py`, so that a published model gets its published number:
nothing is stripped, and "The answer is X" may be followed by any character of the same line.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmlab.config.errors import DataError
from mmlab.data.sources.scienceqa import COLUMNS, LETTERS, Problem
from mmlab.evaluate.scores.score_table import Reference, Row, Scores, rows_of, share

FAILED = -1
"""The index of a reply without an answer, as in LLaVA's result files."""

_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def letter_of(text: str) -> str | None:
    """The letter that a reply answers with, even if it is not among the choices; None if there is none.

    A bare letter; else the letter of a leading "X. "; else that of the only "The answer is X.".
    """
    if text in tuple(LETTERS):
        return text
    if text[:1] in tuple(LETTERS) and text[1:3] == ". ":
        return text[0]
    letters = _SENTENCE.findall(text)
    return letters[0] if len(letters) == 1 else None


def extract(text: str, choices: int) -> int:
    """The index of the choice that a reply answers with; `FAILED` without a letter or with one that is not a choice.

    Args:
        text: the reply.
        choices: number of choices.
    """
    letter = letter_of(text)
    return LETTERS.index(letter) if letter and letter in LETTERS[:choices] else FAILED


def scienceqa(predictions: Sequence[str | None], references: Sequence[Reference]) -> Scores:
    """Accuracy, overall and in ScienceQA's eight columns; replies without a letter are wrong and counted as `failed`.

    Raises:
        DataError: a reference whose answer is not a letter of its choices.
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
    """The reference for replies to a problem."""
    return Reference(problem.id, (problem.letter,), problem.columns, problem.id, len(problem.choices))


def result_layout(predictions: Sequence[str | None], references: Sequence[Reference]) -> dict[str, Any]:
    """The replies and their indices in the format of LLaVA's result files: `{acc, correct, count, results, outputs}`.

    A missing reply is the text "FAILED".
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

    Older result files have a random index for a reply without an answer; these differ although no letter was read
    differently.

    Returns:
        Counts: `compared`, `differ`, and of these `differ_with_letter`, for which our rules find a choice.
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
            f"question {reference.key}: metric=scienceqa compares letters, but the right answer {answer!r} is none of"
            f" its {reference.choices} choices; shards need a `reference`, as written by mmlab shards build scienceqa."
        )
    return LETTERS.index(answer)
