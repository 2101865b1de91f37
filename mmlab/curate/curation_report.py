"""Reports of the two curations, counted from what lies in their folders, so that a kill changes nothing in them.

In LLaVA's report, every step accounts for its input: chosen = answered + unanswered, answered = parsed + malformed,
parsed = kept + caught.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from mmlab.curate.config import LLMConfig
from mmlab.curate.decisions import decided
from mmlab.curate.journal import Row, step_rows

LOSSES = ("unanswered", "malformed", "rules")
"""Counters of what LLaVA's steps lose, by reason; several rules may catch one dialogue."""


def minigpt4_report(out: Path, llm: LLMConfig, written: dict[str, Any] | None) -> dict[str, Any]:
    """Counts of every step.

    Args:
        out: folder of the curation.
        llm: has the prices.
        written: `samples` and `hash` of the shards; None before they are written.
    """
    described, continued, repaired, filtered = (
        step_rows(out, name) for name in ("described", "continued", "repaired", "filtered")
    )
    kept = [row for row in filtered if not row["caught"]]
    actions = Counter(row["action"] for row in decided(out, kept).values())
    rules = Counter(rule for row in filtered for rule in row["caught"])
    good = [row for row in repaired if "fault" not in row]
    return {
        "described": _lengths(described),
        "continued": {**_lengths(continued), "continued": sum(row["continued"] for row in continued)},
        "repaired": {
            "changed": sum(row["changed"] for row in good),
            "unchanged": sum(not row["changed"] for row in good),
            "unrepaired": sum("unrepaired" in row for row in good),
            "faults": _faults(repaired),
            **_usage(repaired, llm),
        },
        "filtered": {"kept": len(kept), "caught": len(filtered) - len(kept), "rules": dict(rules.most_common())},
        "reviewed": {
            "accepted": actions["accept"],
            "edited": actions["edit"],
            "rejected": actions["reject"],
            "left": len(kept) - actions.total(),
        },
        "written": written,
    }


def minigpt4_lines(report: dict[str, Any]) -> list[str]:
    """The report as text, one or two lines per step."""
    described, continued, repaired = report["described"], report["continued"], report["repaired"]
    filtered, reviewed, written = report["filtered"], report["reviewed"], report["written"]
    lines = [
        f"{'described':<12}{described['samples']} images, {described['tokens']:.1f} tokens on average"
        + _dropped(described),
        f"{'continued':<12}{continued['continued']} of {continued['samples']}, {continued['tokens']:.1f} tokens on "
        "average",
        f"{'repaired':<12}{repaired['changed']} changed, {repaired['unchanged']} unchanged"
        + (f", {repaired['unrepaired']} without a reply" if repaired["unrepaired"] else "")
        + _dropped(repaired),
        f"{'':<12}{_usage_text(repaired)}",
        f"{'filtered':<12}{filtered['kept']} kept, {filtered['caught']} caught"
        + (f": {_listed(filtered['rules'])}" if filtered["rules"] else ""),
        f"{'reviewed':<12}{_listed(reviewed)}",
    ]
    return lines if written is None else [*lines, f"{'written':<12}{written['samples']} samples"]


def instruct_report(
    out: Path, types: Sequence[str], llm: LLMConfig, data: dict[str, int], written: dict[str, Any]
) -> dict[str, Any]:
    """Counts of every step, for each type and in total.

    Args:
        out: folder of the curation.
        types: the requested response types, in order.
        llm: has the prices.
        data: `samples`, how many of them are `without_context`, and the counts of a conversion.
        written: `entries` of the JSON, `samples` and `hash` of the shards.
    """
    steps = {name: step_rows(out, name) for name in ("answered", "parsed", "filtered")}
    by_type = {
        kind: {name: [row for row in rows if row["type"] == kind] for name, rows in steps.items()} for kind in types
    }
    return {
        "data": data,
        "types": {kind: _type_counts(**rows, llm=llm) for kind, rows in by_type.items()},
        "total": _type_counts(**steps, llm=llm),
        "written": {**written, "without_picture": written["entries"] - written["samples"]},
    }


def instruct_lines(report: dict[str, Any]) -> list[str]:
    """The report as text: a line per type, the reasons of losses, and what was written."""
    total, written = report["total"], report["written"]
    data = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in report["data"].items() if n)
    lines = [f"{'read':<20}{data}"]
    lines += [f"{'':<20}{'chosen':>9}{'answered':>10}{'parsed':>9}{'kept':>9}{'turns':>8}{'words':>8}"]
    for kind, row in [*report["types"].items(), ("total", total)]:
        numbers = f"{row['chosen']:>9}{row['answered']:>10}{row['parsed']:>9}{row['kept']:>9}"
        lines.append(f"{kind:<20}{numbers}{row['turns']:>8.1f}{row['words']:>8.1f}")
    lines += [f"{name:<20}{_listed(total[name])}" for name in LOSSES if total[name]]
    lines.append(f"{'usage':<20}{_usage_text(total)}")
    lost = f", {written['without_picture']} have no image" if written["without_picture"] else ""
    lines.append(f"{'written':<20}{written['entries']} dialogues, {written['samples']} of them to shards{lost}")
    return lines


def _type_counts(
    answered: Sequence[Row], parsed: Sequence[Row], filtered: Sequence[Row], llm: LLMConfig
) -> dict[str, Any]:
    kept = [row for row in filtered if not row["caught"]]
    answers = [answer for row in kept for _, answer in row["turns"]]
    unanswered, malformed = (_sorted(row["fault"] for row in rows if "fault" in row) for rows in (answered, parsed))
    usage = _usage(answered, llm)
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


def _usage(rows: Sequence[Row], llm: LLMConfig) -> dict[str, Any]:
    """Tokens, cost and retries of all replies, unusable ones included; a reply that rows share is counted once."""
    replies = {row["reply"]: row for row in rows if "reply" in row}
    prompt, completion = (sum(row[f"{side}_tokens"] for row in replies.values()) for side in ("prompt", "completion"))
    prices = llm.prompt_price, llm.completion_price
    retries: Counter[str] = Counter()
    for row in replies.values():
        retries.update(row["retries"])
    return {
        "replies": len(replies),
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cost": None if None in prices else (prompt * (prices[0] or 0) + completion * (prices[1] or 0)) / 1e6,
        "retries": dict(retries.most_common()),
    }


def _usage_text(usage: dict[str, Any]) -> str:
    return (
        f"{usage['replies']} replies, {usage['prompt_tokens']:,} prompt tokens, {usage['completion_tokens']:,} "
        + ("completion tokens" if usage["cost"] is None else f"completion tokens, cost {usage['cost']:.4f}")
        + (f"; retries: {_listed(usage['retries'])}" if usage["retries"] else "")
    )


def _lengths(rows: Sequence[Row]) -> dict[str, Any]:
    good = [row for row in rows if "fault" not in row]
    tokens = mean(row["tokens"] for row in good) if good else 0.0
    return {"samples": len(good), "tokens": tokens, "faults": _faults(rows)}


def _faults(rows: Sequence[Row]) -> dict[str, int]:
    return dict(Counter(row["fault"] for row in rows if "fault" in row).most_common())


def _dropped(counts: dict[str, Any]) -> str:
    lost = sum(counts["faults"].values())
    return f"; {lost} left out, the first because: {next(iter(counts['faults']))}" if lost else ""


def _sorted(names: Iterable[str]) -> dict[str, int]:
    """Counts, the most frequent name first, ties by name: the rows' order, that of the replies, varies."""
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())
