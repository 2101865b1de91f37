"""What replies without pictures score: the same reply to all questions of a type, and the model's own, blind.

A model that ignores its pictures can score high where right answers are alike; these numbers beside a score show it,
and how varied its replies are.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmlab.evaluate.scores.score_table import BASELINES, UNTYPED, Reference, Scorer, share, show
from mmlab.evaluate.scores.scorers import matches, normalized

CANDIDATES = 16  # of the commonest right answers, and as many spread over the others
LEAST = 10  # right answers of a type from which it gets a reply of its own
TRIED_ON = 300  # references that candidates are compared on, because scoring captions is slow


def with_baselines(
    scorer: Scorer,
    replies: Sequence[str | None],
    references: Sequence[Reference],
    training: Sequence[Reference] | None = None,
    blind: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """The numbers that belong beside the scores of replies.

    Args:
        scorer: of the metric.
        replies: of the model.
        references: the right answers to the same questions.
        training: right answers of the training set, from which constant replies are taken; None: `references`.
        blind: place of a question → the model's reply to it without its picture.

    Returns:
        `constant`: the scores of one reply to all questions of a type (the first one that a reference has), the best
        one, with the texts by type as `replies`, and as `reply` if all are the same; `replies`: see `variety`;
        `blind`: see `blind_scores`, if there is a blind reply.
    """
    table = {"constant": _constant(scorer, replies, references, training), "replies": variety(replies)}
    return {**({"blind": blind_scores(scorer, references, replies, blind)} if blind else {}), **table}


def blind_scores(
    scorer: Scorer, references: Sequence[Reference], replies: Sequence[str | None], blind: Mapping[int, str]
) -> dict[str, Any]:
    """The scores of blind replies beside those of the replies with pictures to the same questions.

    Args:
        scorer: of the metric.
        references: the right answers.
        replies: the replies with pictures.
        blind: place of a question → its blind reply; at least one.

    Returns:
        The scores as JSON. Each row has `seen`, the main number of the replies with pictures, and `gain`, by how much
        it is higher. `unchanged` is the share of the questions whose reply is the same with and without the picture;
        if it is 1, the pictures are not used.
    """
    places = sorted(blind)
    asked, seen = [references[n] for n in places], [replies[n] for n in places]
    without, given = scorer([blind[n] for n in places], asked), scorer(seen, asked)
    for row, other in [(without.all, given.all), *((row, given.types[name]) for name, row in without.types.items())]:
        low, high = row.get(without.main), other.get(without.main)
        row["seen"] = high
        row["gain"] = None if low is None or high is None else high - low
    same = sum(matches(text or "", blind[n]) for n, text in zip(places, seen, strict=True))
    return {**without.as_json(), "unchanged": share(same, len(places))}


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


def blind_line(blind: dict[str, Any], questions: int) -> str:
    """How many questions were asked blind, and how many replies that changed, as text."""
    same = blind["unchanged"] or 0
    asked = f"blind and gain: {blind['questions']:,} of {questions:,} questions"
    return f"{asked}; {same:.1%} of the replies stay the same without the picture"


def beside(main: str, summary: dict[str, Any]) -> str:
    """The baselines of a summary and the variety of its replies as a line, for titles; `main` is the main number."""
    baselines = [(name.replace("_", " "), summary[name]) for name in BASELINES if summary.get(name)]
    rows = [f"{name}: {show(main, row.get(main))}" for name, row in baselines]
    varied = variety_line(summary["replies"], summary["questions"]) if summary.get("replies") else ""
    return "; ".join(filter(None, [*rows, varied]))


def _constant(
    scorer: Scorer,
    replies: Sequence[str | None],
    references: Sequence[Reference],
    training: Sequence[Reference] | None,
) -> dict[str, Any]:
    learned = references if training is None else training
    known: dict[str, list[Reference]] = {}
    for reference in learned:
        known.setdefault(_first_type(reference), []).append(reference)
    types: dict[str, list[int]] = {}
    for n, reference in enumerate(references):
        types.setdefault(_first_type(reference), []).append(n)
    # The model's commonest reply, too: no model that always says the same looks better than this baseline.
    everywhere = _best(scorer, references, [*_candidates(learned), _usual(replies)])
    best = dict.fromkeys(types, everywhere)
    for name, places in types.items():
        if len(types) > 1 and len(known.get(name, [])) >= LEAST:
            candidates = [*_candidates(known[name]), _usual([replies[n] for n in places]), everywhere]
            best[name] = _best(scorer, [references[n] for n in places], candidates)
    # Numbers such as F1 are no means over types, and may be lower with the best reply of each.
    options = [best, dict.fromkeys(types, everywhere)]
    scores = [scorer([texts[_first_type(one)] for one in references], references) for texts in options]
    n = max(range(2), key=lambda n: scores[n].all[scores[n].main] or 0.0)
    texts = {name or UNTYPED: text for name, text in options[n].items()}
    same = {"reply": everywhere} if set(texts.values()) == {everywhere} else {}
    return {**same, "replies": texts, **scores[n].as_json()}


def _first_type(reference: Reference) -> str:
    return reference.types[0] if reference.types else ""


def _usual(replies: Sequence[str | None]) -> str:
    return str(variety(replies)["commonest"])


def _best(scorer: Scorer, references: Sequence[Reference], candidates: Sequence[str]) -> str:
    """The candidate that scores best as the reply to all questions."""
    some = _some(references)

    def value(reply: str) -> float:
        scores = scorer([reply] * len(some), some)
        return scores.all[scores.main] or 0.0

    return max(dict.fromkeys(candidates), key=value)


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
