"""What a curation of instruction data came to, type by type, counted from what lies in its folder.

At each step what came in is what went on and what stayed behind, with the reason: chosen = answered + unanswered,
answered = parsed + malformed, parsed = kept + caught.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from mmlab.curate.journal import Row
from mmlab.curate.report import spent
from mmlab.curate.steps import step_rows

LOSSES = ("unanswered", "malformed", "rules")
"""Counters of what stayed behind, by reason; a dialogue may be caught by several rules."""
Prices = tuple[float | None, float | None]


def report(
    out: Path, types: Sequence[str], prices: Prices, data: dict[str, int], written: dict[str, Any]
) -> dict[str, Any]:
    """Counts of every step, for each type and over all.

    Args:
        out: folder of the curation.
        types: those that were asked for, in their order.
        prices: per million tokens, of prompts and of answers.
        data: `samples` that there are, those of them `without_context`, and what else was counted when they were read.
        written: `entries` of the JSON, `samples` and `hash` of the shards.
    """
    steps = {name: step_rows(out, name) for name in ("answered", "parsed", "filtered")}
    of_type = {
        kind: {name: [row for row in rows if row["type"] == kind] for name, rows in steps.items()} for kind in types
    }
    return {
        "data": data,
        "types": {kind: _counts(**rows, prices=prices) for kind, rows in of_type.items()},
        "total": _counts(**steps, prices=prices),
        "written": {**written, "without_picture": written["entries"] - written["samples"]},
    }


def lines(counts: dict[str, Any]) -> list[str]:
    """The report for a reader: a line for each type, why something was left out, and what was written."""
    data = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in counts["data"].items() if n)
    told = [f"{'read':<20}{data}"]
    told += [f"{'':<20}{'chosen':>9}{'answered':>10}{'parsed':>9}{'kept':>9}{'turns':>8}{'words':>8}"]
    for kind, row in [*counts["types"].items(), ("total", counts["total"])]:
        numbers = f"{row['chosen']:>9}{row['answered']:>10}{row['parsed']:>9}{row['kept']:>9}"
        told.append(f"{kind:<20}{numbers}{row['turns']:>8.1f}{row['words']:>8.1f}")
    total, written = counts["total"], counts["written"]
    for name in LOSSES:
        if total[name]:
            told.append(f"{name:<20}{', '.join(f'{reason} {number}' for reason, number in total[name].items())}")
    cost = "" if total["cost"] is None else f", cost {total['cost']:.4f}"
    usage = f"{total['prompt_tokens']:,} tokens asked, {total['completion_tokens']:,} answered{cost}"
    retries = ", ".join(f"{reason} {number}" for reason, number in total["retries"].items())
    told.append(f"{'replies':<20}{total['replies']}, {usage}{f'; asked again: {retries}' if retries else ''}")
    lost = f", {written['without_picture']} without a picture" if written["without_picture"] else ""
    told.append(f"{'written':<20}{written['entries']} dialogues, {written['samples']} of them to shards{lost}")
    return told


def _counts(answered: Sequence[Row], parsed: Sequence[Row], filtered: Sequence[Row], prices: Prices) -> dict[str, Any]:
    kept = [row for row in filtered if not row["caught"]]
    answers = [answer for row in kept for _, answer in row["turns"]]
    unanswered, malformed = (_sorted(row["fault"] for row in rows if "fault" in row) for rows in (answered, parsed))
    usage = spent(answered, prices)
    return {
        "chosen": len(answered),
        "answered": len(answered) - sum(unanswered.values()),
        "unanswered": unanswered,
        "parsed": len(parsed) - sum(malformed.values()),
        "malformed": malformed,
        "caught": len(filtered) - len(kept),
        "rules": _sorted(rule for row in filtered for rule in row["caught"]),
        "kept": len(kept),
        "turns": mean(len(row["turns"]) for row in kept) if kept else 0.0,
        "words": mean(len(answer.split()) for answer in answers) if answers else 0.0,
        **{**usage, "retries": _sorted(Counter(usage["retries"]).elements())},
    }


def _sorted(names: Iterable[str]) -> dict[str, int]:
    """Counts, the commonest first; rows come in the order of the answers, which is another each time."""
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))
