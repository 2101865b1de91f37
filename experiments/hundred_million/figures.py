"""Print the figures of one run of run.sh as one JSON object and draw them: figures.py FIGURES SECONDS."""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MEGA, SAMPLES = 1e6, 10_000
SHARDS = (1000, 4000, 13000)


def main() -> None:
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    generated = next(line for line in lines if line["what"] == "generate")
    results: dict[str, Any] = {"generate_seconds": generated["seconds"], "generated": generated["samples"]}
    for code in ("after", "before"):
        mine = [line for line in lines if line.get("code") == code]
        results[code] = {str(shards): of_set(mine, shards, SAMPLES) for shards in SHARDS}
        builds = [line["samples"] / line["cpu"] for line in mine if line["what"] == "build"]
        results[code]["samples_indexed_per_second_of_cpu"] = median(builds)
        results[code]["pairs"] = len(builds)
    for figures in results["after"].values():
        if isinstance(figures, dict):
            figures["index_bytes_a_sample"] = generated["table_bytes"] / generated["samples"]
    results["after_1000_samples_a_shard"] = of_set([line for line in lines if line.get("code") == "after"], 1000, 1000)
    extrapolate(results["before"])
    draw(results, Path("hundred_million.png"))
    print(json.dumps(rounded({**results, "minutes": int(sys.argv[2]) / 60})))


def of_set(lines: list[dict[str, Any]], shards: int, samples: int) -> dict[str, Any]:
    """Medians over all rounds for one set; megabytes and seconds."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if (line.get("shards"), line["samples"]) == (shards, shards * samples):
            by_name.setdefault(line["what"], []).append(line)

    def middle(what: str, value: Any) -> float:
        return median(map(value, by_name[what]))

    figures: dict[str, Any] = {}
    if "join" in by_name:
        (join,) = by_name["join"]
        if join.get("own_way", True):
            figures |= {
                "join_seconds": join["seconds"],
                "join_cpu_seconds": join["cpu"],
                "join_peak_mb": join["peak"] / MEGA,
            }
        if "index_bytes" in join:
            figures["index_bytes_a_sample"] = join["index_bytes"] / join["samples"]
        if "manifest_bytes" in join:
            figures["manifest_mb"] = join["manifest_bytes"] / MEGA
    if opens := [line for one in by_name.values() for line in one if "opened" in line]:
        figures["open_seconds"] = median(line["open_cpu"] for line in opens)
        figures["open_wall_seconds"] = median(line["open_seconds"] for line in opens)
        for kind in ("resident", "private"):
            figures[f"opened_{kind}_mb"] = median(line["opened"][kind] / MEGA for line in opens)
        figures["index_private_mb"] = figures["opened_private_mb"] - median(
            line["imported"]["private"] / MEGA for line in opens if line["what"] not in ("fork", "spawn")
        )
    for what in ("random", "training"):
        if what in by_name:
            figures[f"{what}_seeks_per_second"] = middle(what, lambda line: line["seeks"] / line["cpu"])
            for kind in ("resident", "private"):
                figures[f"{what}_{kind}_mb"] = middle(what, lambda line, kind=kind: line["after"][kind] / MEGA)
    if "order" in by_name:
        figures["order_seconds"] = middle("order", lambda line: line["cpu"])
    if "types" in by_name:
        figures["by_type_seconds"] = middle("types", lambda line: line["cpu"])
        figures["numbers_by_type_per_second"] = middle("types", lambda line: line["numbers"] / line["number_cpu"])
    if "batch" in by_name:
        for name in ("all", "all_cpu", "imports", "first_batch"):
            figures[f"start_{name}_seconds"] = middle("batch", lambda line, name=name: line[name])
    for what in ("fork", "spawn"):
        if what in by_name:
            share = [
                line["main"]["share"] + sum(worker["share"] for worker in line["workers"]) for line in by_name[what]
            ]
            private = [worker["private"] for line in by_name[what] for worker in line["workers"]]
            figures[f"{what}_share_mb"] = median(share) / MEGA
            figures[f"{what}_worker_private_mb"] = median(private) / MEGA
    return figures


def extrapolate(before: dict[str, Any]) -> None:
    """Continue the earlier version's figures for the largest set: through those of the sets that were measured."""
    small, large = before["1000"], before["4000"]
    for name in ("open_seconds", "opened_resident_mb", "opened_private_mb"):
        slope = (large[name] - small[name]) / 3000
        before["13000"][name] = large[name] + slope * 9000
    before["13000"]["extrapolated"] = True


def draw(results: dict[str, Any], path: Path) -> None:
    """Memory, time and speed over the number of samples."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    quantities = [
        ("opened_private_mb", "private memory of a process\nthat opened the index (MB)"),
        ("open_seconds", "CPU time to open the index (s)"),
        ("seeks", "seeks per second of CPU time"),
    ]
    for panel, (name, label) in zip(panels, quantities, strict=True):
        if name == "seeks":
            curve(panel, results["after"], "training_seeks_per_second", "C0", "o-", "a table per shard, training order")
            curve(panel, results["after"], "random_seeks_per_second", "C0", "s--", "a table per shard, at random")
            curve(panel, results["before"], "training_seeks_per_second", "C1", "o", "one index, training order")
            curve(panel, results["before"], "random_seeks_per_second", "C1", "s", "one index, at random")
        else:
            curve(panel, results["after"], name, "C0", "o-", "a table per shard")
            before = results["before"]
            curve(panel, {key: before[key] for key in ("1000", "4000")}, name, "C1", "o-", "one index")
            curve(panel, {key: before[key] for key in ("4000", "13000")}, name, "C1", ":", "one index, extrapolated")
        panel.set(xscale="log", yscale="log", xlabel="samples (millions), 10,000 per shard", ylabel=label)
        panel.set_xticks([10, 40, 130], ["10", "40", "130"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def curve(panel: Any, sets: dict[str, Any], name: str, color: str, line: str, label: str) -> None:
    points = [
        (int(key) * SAMPLES / MEGA, value[name]) for key, value in sets.items() if key.isdigit() and name in value
    ]
    panel.plot(*zip(*points, strict=True), line, color=color, label=label)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
