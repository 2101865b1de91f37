"""The results of run.sh as one JSON object, and a picture of the cache's bytes over time: figures.py GB SECONDS."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PARTS = {"faults": "two ranks read through faults", "kills": "a run is killed during fetches and evictions"}


def main(gigabytes: float, seconds: int) -> None:
    results: dict[str, Any] = {name: json.loads(Path(f"{name}.log").read_text().splitlines()[-1]) for name in PARTS}
    watched = {name: json.loads(Path(f"{name}-bytes.json").read_text()) for name in PARTS}
    limit = int(gigabytes * 1e9)
    most = {key: max(each[key] for each in watched.values()) for key in ("most_length", "most_allocated")}
    looks = sum(each["looks"] for each in watched.values())
    results["cache"] = {"limit": limit, **most, "looks": looks, "exceeded": most["most_length"] > limit}
    draw(limit / 1e6)
    print(json.dumps({**results, "minutes": round(seconds / 60, 1)}))


def draw(limit: float) -> None:
    """Bytes in the cache and downloads under way, over time, in cache.png; `limit` in MB."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 4.5), height_ratios=(3, 1), sharex="col", layout="constrained")
    for (upper, lower), (name, title) in zip(axes.T, PARTS.items(), strict=True):
        with Path(f"{name}.csv").open() as file:
            rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
        minutes = [row["seconds"] / 60 for row in rows]
        upper.plot(minutes, [row["length"] / 1e6 for row in rows], linewidth=0.6)
        upper.axhline(limit, color="black", linestyle="--", linewidth=1)
        upper.text(0, limit, " limit", va="bottom")
        upper.set(title=title, ylabel="MB in the cache", ylim=(0, limit * 1.15))
        lower.plot(minutes, [row["parts"] for row in rows], linewidth=0.4, color="tab:orange")
        lower.set(xlabel="minutes", ylabel="downloads")
    figure.savefig("cache.png", dpi=110)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
