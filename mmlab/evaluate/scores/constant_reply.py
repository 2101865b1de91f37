"""What one reply to every question would score, and how varied a model's replies are.

A model that ignores its images can score high where right answers are alike; these numbers beside a score show it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mmlab.evaluate.scores.score_table import BASELINES, Reference, Scorer, share, show
from mmlab.evaluate.scores.scorers import normalized

CANDIDATES = 16  # of the commonest right answers, and as many spread over the others
TRIED_ON = 300  # references that candidates are compared on, because scoring captions is slow


def with_baselines(
    scorer: Scorer,
    replies: Sequence[str | None],
    references: Sequence[Reference],
    training: Sequence[Reference] | None = None,
) -> dict[str, Any]:
    """The numbers that belong beside the scores of replies.

    Args:
        scorer: of the metric.
        replies: of the model.
        references: the right answers to the same questions.
        training: right answers of the training set, from which the constant reply is taken; None: `references`.

    Returns:
        `constant`: the scores of the reply that scores best when it is given to every question, with its text as
        `reply`; `replies`: see `variety`.
    """
    return {"constant": _best_constant(scorer, replies, references, training), "replies": variety(replies)}


def variety(replies: Sequence[str | None]) -> dict[str, Any]:
    """How many different replies there are, apart from case and spaces, the commonest one, and its share."""
    counts = Counter(normalized(reply) for reply in replies if reply is not None)
    commonest, count = counts.most_common(1)[0] if counts else ("", 0)
    shown = next((reply for reply in replies if reply is not None and normalized(reply) == commonest), "")
    return {"distinct": len(counts), "commonest": shown, "commonest_share": share(count, len(replies))}


def variety_line(replies: dict[str, Any], questions: int) -> str:
    """`variety` as text."""
    text = replies["commonest"]
    text = text if len(text) <= 60 else f"{text[:59]}…"
    count, part = replies["distinct"], replies["commonest_share"] or 0
    distinct = f"{count:,} distinct {'reply' if count == 1 else 'replies'} to {questions:,} questions"
    return f"{distinct}; {part:.1%} are {text!r}"


def beside(main: str, summary: dict[str, Any]) -> str:
    """The baselines of a summary and the variety of its replies as a line, for titles; `main` is the main number."""
    rows = [f"{name}: {show(main, summary[name].get(main))}" for name in BASELINES if summary.get(name)]
    varied = variety_line(summary["replies"], summary["questions"]) if summary.get("replies") else ""
    return "; ".join(filter(None, [*rows, varied]))


def _best_constant(
    scorer: Scorer,
    replies: Sequence[str | None],
    references: Sequence[Reference],
    training: Sequence[Reference] | None,
) -> dict[str, Any]:
    candidates = _candidates(references if training is None else training)
    # The model's commonest reply, too: no model that always says the same looks better than this baseline.
    candidates = list(dict.fromkeys([*candidates, variety(replies)["commonest"]]))
    some = _some(references)

    def value(reply: str) -> float:
        scores = scorer([reply] * len(some), some)
        return scores.all[scores.main] or 0.0

    best = max(candidates, key=value)
    return {"reply": best, **scorer([best] * len(references), references).as_json()}


def _candidates(references: Sequence[Reference]) -> list[str]:
    """The commonest right answers, others spread over the set, and the commonest lists of several answers as one."""
    forms: dict[str, str] = {}
    for reference in references:
        for answer in reference.answers:
            forms.setdefault(normalized(answer), answer)
    counts = Counter(normalized(answer) for reference in references for answer in reference.answers)
    common = [forms[name] for name, _ in counts.most_common(CANDIDATES)]
    rest = [text for name, text in forms.items() if text not in common]
    several = Counter(" ".join(reference.answers) for reference in references if len(reference.answers) > 1)
    whole = [text for text, _ in several.most_common(CANDIDATES)]  # a reply may state several facts
    return [*common, *rest[:: max(1, len(rest) // CANDIDATES)][:CANDIDATES], *whole]


def _some(references: Sequence[Reference]) -> list[Reference]:
    """The references of some images, evenly spread; those of one image stay together."""
    groups: dict[str, list[Reference]] = {}
    for reference in references:
        groups.setdefault(reference.picture or reference.key, []).append(reference)
    step = max(1, len(references) // TRIED_ON)
    return [reference for group in list(groups.values())[::step] for reference in group]
