"""Sums of what batches say about their samples; no heavy import, since every worker process keeps one."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmlab.config.errors import DataError

_KEPT = 1000  # bad samples written out; beyond that the counters go on


class DataReport:
    """Sums the `stats` and `bad` of batches.

    Args:
        budget: largest share of a source's samples that may be replaced.
        floor: replacements that are always allowed, so that a bad sample among the first does not stop a run.
        slack: how many times over either `check` lets pass, for who sees a part of the run only.
    """

    def __init__(self, budget: float = 0.001, floor: int = 10, slack: int = 1):
        self.budget = budget
        self.floor = floor
        self.slack = slack
        self.counters: dict[str, Counter[str]] = {}
        self.bad: list[dict[str, Any]] = []
        self.bad_left_out = 0

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count one batch (or another report's `state_dict`)."""
        for source, counts in batch.get("stats", {}).items():
            self.counters.setdefault(source, Counter()).update(counts)
        bad = batch.get("bad", [])
        room = max(_KEPT - len(self.bad), 0)
        self.bad += bad[:room]
        self.bad_left_out += len(bad[room:]) + batch.get("bad_left_out", 0)

    @property
    def replaced(self) -> int:
        return sum(counts["replaced"] for counts in self.counters.values())

    def check(self) -> None:
        """Raise DataError with the source and its commonest reason once too many samples were replaced."""
        for source, counts in self.counters.items():
            if counts["replaced"] > self.slack * max(self.floor, self.budget * counts["seen"]):
                reasons = {name: n for name, n in counts.items() if name.startswith("replaced/")}
                reason = max(reasons, key=lambda name: reasons[name], default="replaced/unknown")
                example = next((bad for bad in self.bad if bad["source"] == source), None)
                such_as = f", such as {example['key']}: {example['message']}" if example else ""
                raise DataError(
                    f"source '{source}': {counts['replaced']} of {counts['seen']} samples had to be replaced,"
                    f" more than bad_budget={self.budget:g} allows; the commonest reason is"
                    f" '{reason.removeprefix('replaced/')}'{such_as}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Plain data that `add` takes back, for a checkpoint or another rank."""
        stats = {source: dict(counts) for source, counts in self.counters.items()}
        return {"stats": stats, "bad": list(self.bad), "bad_left_out": self.bad_left_out}

    def summary(self) -> dict[str, Any]:
        """Counters per source; `share`, also that of each response type, is of all samples, `loss_share` of tokens."""
        total = sum(counts["seen"] for counts in self.counters.values())
        sources = {}
        types: Counter[str] = Counter()
        for source, counts in sorted(self.counters.items()):
            row: dict[str, Any] = {name: counts[name] for name in sorted(counts)}
            row["share"] = counts["seen"] / total if total else 0.0
            row["replaced_share"] = counts["replaced"] / counts["seen"] if counts["seen"] else 0.0
            if counts["tokens"]:
                row["loss_share"] = counts["tokens_with_loss"] / counts["tokens"]
            sources[source] = row
            types.update({name[5:]: n for name, n in counts.items() if name.startswith("type/")})
        shares = {name: {"seen": n, "share": n / total} for name, n in sorted(types.items())}
        return {"seen": total, "sources": sources, "types": shares, "bad": self.bad, "bad_left_out": self.bad_left_out}

    def write(self, path: str | Path) -> None:
        """Write the summary as JSON."""
        write_json(Path(path), self.summary())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)
