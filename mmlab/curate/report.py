"""What a curation came to, counted from what lies in its folder: the same whenever and however often it was killed."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from mmlab.curate.decisions import decided
from mmlab.curate.journal import Row
from mmlab.curate.steps import step_rows


def report(out: Path, prices: tuple[float | None, float | None], written: dict[str, Any] | None) -> dict[str, Any]:
    """Counts of every step.

    Args:
        out: folder of the curation.
        prices: per million tokens, of prompts and of answers; None where a cost is not known.
        written: `samples` and `hash` of the shards; None as long as there are none.
    """
    described, continued, repaired, filtered = (
        step_rows(out, name) for name in ("described", "continued", "repaired", "filtered")
    )
    kept = [row for row in filtered if not row["caught"]]
    actions = Counter(row["action"] for row in decided(out, kept).values())
    rules = Counter(rule for row in filtered for rule in row["caught"])
    return {
        "described": _lengths(described),
        "continued": {**_lengths(continued), "continued": sum(row["continued"] for row in continued)},
        "repaired": _repairs(repaired, prices),
        "filtered": {"kept": len(kept), "caught": len(filtered) - len(kept), "rules": dict(rules.most_common())},
        "reviewed": {
            "accepted": actions["accept"],
            "edited": actions["edit"],
            "rejected": actions["reject"],
            "left": len(kept) - actions.total(),
        },
        "written": written,
    }


def lines(counts: dict[str, Any]) -> list[str]:
    """The report for a reader, a line a step."""
    described, continued, repaired = counts["described"], counts["continued"], counts["repaired"]
    filtered, reviewed, written = counts["filtered"], counts["reviewed"], counts["written"]
    told = [
        f"{'described':<12}{described['samples']} pictures, {described['tokens']:.1f} tokens on average"
        + _faults(described),
        f"{'continued':<12}{continued['continued']} of {continued['samples']} had to go on, "
        f"{continued['tokens']:.1f} tokens on average",
        f"{'repaired':<12}{repaired['changed']} changed, {repaired['unchanged']} as they were"
        + (f", {repaired['unrepaired']} without an answer" if repaired["unrepaired"] else "")
        + _faults(repaired),
        f"{'':<12}{repaired['replies']} replies, {repaired['prompt_tokens']:,} tokens asked, "
        f"{repaired['completion_tokens']:,} answered"
        + ("" if repaired["cost"] is None else f", cost {repaired['cost']:.4f}")
        + (f"; asked again: {_named(repaired['retries'])}" if repaired["retries"] else ""),
        f"{'filtered':<12}{filtered['kept']} kept, {filtered['caught']} caught"
        + (f": {_named(filtered['rules'])}" if filtered["rules"] else ""),
        f"{'reviewed':<12}{_named(reviewed)}",
    ]
    return told if written is None else [*told, f"{'written':<12}{written['samples']} samples"]


def _lengths(rows: Sequence[Row]) -> dict[str, Any]:
    good = [row for row in rows if "fault" not in row]
    faults = Counter(row["fault"] for row in rows if "fault" in row)
    return {
        "samples": len(good),
        "tokens": mean(row["tokens"] for row in good) if good else 0.0,
        "faults": dict(faults.most_common()),
    }


def _repairs(rows: Sequence[Row], prices: tuple[float | None, float | None]) -> dict[str, Any]:
    good = [row for row in rows if "fault" not in row]
    return {
        "changed": sum(row["changed"] for row in good),
        "unchanged": sum(not row["changed"] for row in good),
        "unrepaired": sum("unrepaired" in row for row in good),
        "faults": dict(Counter(row["fault"] for row in rows if "fault" in row).most_common()),
        **spent(rows, prices),
    }


def spent(rows: Sequence[Row], prices: tuple[float | None, float | None]) -> dict[str, Any]:
    """What the replies behind some rows took. Questions that are alike share a reply, which was paid for once; one
    that could not be used was paid for as well."""
    replies = {row["reply"]: row for row in rows if "reply" in row}
    prompt, completion = (sum(row[f"{side}_tokens"] for row in replies.values()) for side in ("prompt", "completion"))
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


def _faults(counts: dict[str, Any]) -> str:
    lost = sum(counts["faults"].values())
    return f"; {lost} left out, the first for: {next(iter(counts['faults']))}" if lost else ""


def _named(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())
