"""Sums of the counters and bad samples of batches; no heavy import, since every worker process keeps one."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mmlab.config.errors import DataError

CROPPED = "cropped_millionths"
"""Counter, by bucket, of the area that it cuts off, in millionths of each image's, so that sums are exact."""
_LISTED = 1000  # bad samples that are listed; further ones are only counted


class DataReport:
    """Sums the `stats` and `bad` of batches.

    Args:
        budget: share of a source's samples that may be replaced.
        floor: replacements that are always allowed.
        slack: `check` allows this many times either of them, for callers that see only a part of the run.
    """

    def __init__(self, budget: float, floor: int, slack: int = 1):
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
        room = max(_LISTED - len(self.bad), 0)
        self.bad += bad[:room]
        self.bad_left_out += len(bad[room:]) + batch.get("bad_left_out", 0)

    @property
    def replaced(self) -> int:
        return sum(counts["replaced"] for counts in self.counters.values())

    def check(self) -> None:
        """Raise DataError, naming the source and its most common reason, if too many samples were replaced."""
        for source, counts in self.counters.items():
            if counts["replaced"] > self.slack * max(self.floor, self.budget * counts["seen"]):
                reasons = {name: n for name, n in counts.items() if name.startswith("replaced/")}
                reason = max(reasons, key=lambda name: reasons[name], default="replaced/unknown")
                example = next((bad for bad in self.bad if bad["source"] == source), None)
                such_as = f", such as {example['key']}: {example['message']}" if example else ""
                raise DataError(
                    f"source '{source}': {counts['replaced']} of {counts['seen']} samples had to be replaced,"
                    f" more than bad_budget={self.budget:g} allows; the most common reason is"
                    f" '{reason.removeprefix('replaced/')}'{such_as}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Plain data that `add` takes back, for a checkpoint or another rank."""
        stats = {source: dict(counts) for source, counts in self.counters.items()}
        return {"stats": stats, "bad": list(self.bad), "bad_left_out": self.bad_left_out}

    def summary(self) -> dict[str, Any]:
        """Counters per source, response type and aspect bucket, by height x width.

        `share` is of all samples, `loss_share` of the source's tokens, and `cropped` the mean share of an image's area
        that its bucket cuts off.
        """
        total = sum(counts["seen"] for counts in self.counters.values())
        sources = {}
        types, buckets, cut = Counter[str](), Counter[str](), Counter[str]()
        for source, counts in sorted(self.counters.items()):
            row: dict[str, Any] = {name: counts[name] for name in sorted(counts) if not name.startswith(f"{CROPPED}/")}
            row["share"] = counts["seen"] / total if total else 0.0
            row["replaced_share"] = counts["replaced"] / counts["seen"] if counts["seen"] else 0.0
            if counts["tokens"]:
                row["loss_share"] = counts["tokens_with_loss"] / counts["tokens"]
            sources[source] = row
            for kind, into in (("type", types), ("bucket", buckets), (CROPPED, cut)):
                into.update({name.split("/", 1)[1]: n for name, n in counts.items() if name.startswith(f"{kind}/")})
        shares = {name: {"seen": n, "share": n / total} for name, n in sorted(types.items())}
        shapes = {
            name: {"seen": n, "share": n / total, "cropped": round(cut[name] / n / 1e6, 6)}
            for name, n in sorted(buckets.items(), key=lambda item: [int(side) for side in item[0].split("x")])
        }
        summary: dict[str, Any] = {"seen": total, "sources": sources, "types": shares}
        summary |= {"buckets": shapes} if shapes else {}
        return summary | {"bad": self.bad, "bad_left_out": self.bad_left_out}
