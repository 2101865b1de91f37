"""Print the figures of one run of run.sh as one JSON object, and write table.csv and plot.png: figures.py OUT SECONDS.

A cell is compared with its base at equal compute. A difference counts if it exceeds the spread: the root of the sum of
the two squared standard deviations over the seeds.
"""

import csv
import json
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SETS = ("emoji", "scenes")
METRIC = "val/fid"
WIDTHS = ("0.05", "0.1", "0.15")
"""Of averages that are made after training, see run.sh."""


class Cell(NamedTuple):
    """A setting, the one that it is compared with, and what its paper found."""

    name: str
    base: str
    paper: str


CELLS = (
    Cell("epsilon", "v", "v equal or better (2202.00512)"),
    Cell("v_min_snr", "v", "better, 3.4x fewer steps (2303.09556)"),
    Cell("flow", "v", "better than epsilon and v (2401.08740)"),
    Cell("flow_logit_normal", "flow", "better (2403.03206)"),
    Cell("edm", "v", "better than v under DDPM's losses (2206.00364)"),
    Cell("edm_uncertainty", "edm", "better (2312.02696)"),
    Cell("flow_repa", "flow", "better, 17.5x fewer steps (2410.06940)"),
    Cell("v_no_ema", "v", "worse (2312.02696)"),
    Cell("v_ema_999", "v", "better in long runs"),
    *(Cell(f"v_posthoc_{width}", "v", "as good as the best plain one (2312.02696)") for width in WIDTHS),
)


def read(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(test set, cell) → mean, spread and the values of the seeds in their order, and the steps."""
    with open(out / "runs" / "sweeps" / "diffusion_ablation" / "table.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "complete"]
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        name, cell, steps = row["experiment"].rpartition("/")[2], row["+cell"], int(row["steps"])
        found.setdefault((name, cell), []).append((steps, float(row[METRIC])))
        for width in WIDTHS if cell == "v" else ():
            scores = out / "eval" / "diffusion_ablation" / row["run"] / width / "scores.json"
            if scores.exists():
                fid = json.loads(scores.read_text())["fid"]
                found.setdefault((name, f"v_posthoc_{width}"), []).append((steps, fid))
    return {point: summed_up(*zip(*seeds, strict=True)) for point, seeds in found.items()}


def summed_up(steps: tuple[int, ...], values: tuple[float, ...]) -> dict[str, Any]:
    """Mean and standard deviation of the metric."""
    spread = stdev(values) if len(values) > 1 else 0.0
    return {"steps": steps[0], "mean": fmean(values), "spread": spread, "seeds": list(values)}


def verdict(cell: dict[str, Any], base: dict[str, Any]) -> str:
    """`better`, `worse` or `within spread`; a lower metric is better."""
    difference = cell["mean"] - base["mean"]
    if abs(difference) <= (cell["spread"] ** 2 + base["spread"] ** 2) ** 0.5:
        return "within spread"
    return "worse" if difference > 0 else "better"


def draw(figures: dict[str, Any], file: Path) -> None:
    """A panel for each test set: mean and standard deviation of each cell."""
    picture, panels = plt.subplots(1, len(SETS), figsize=(11, 4.2), sharey=True, layout="constrained")
    names = list(figures[SETS[0]])[::-1]
    for axes, name in zip(panels, SETS, strict=True):
        for place, cell in enumerate(names):
            if (row := figures.get(name, {}).get(cell)) is None:
                continue
            color = {"better": "tab:green", "worse": "tab:red"}.get(row.get("verdict", ""), "0.4")
            axes.errorbar(row["mean"], place, xerr=row["spread"], fmt="o", color=color, capsize=3)
            axes.plot(row["seeds"], [place] * len(row["seeds"]), "|", color=color, alpha=0.6)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("FID, lower is better; bars: one standard deviation")
        axes.set_title(name)
        axes.grid(axis="x", color="0.9")
    picture.savefig(file, dpi=110)


def main() -> None:
    out, seconds = Path(sys.argv[1]), int(sys.argv[2])
    points = read(out)
    figures: dict[str, Any] = {}
    for name in SETS:
        if (name, "v") not in points:
            continue
        figures[name] = {"v": points[name, "v"]}
        for cell in (cell for cell in CELLS if (name, cell.name) in points):
            row, base = points[name, cell.name], points[name, cell.base]
            figures[name][cell.name] = {**row, "base": cell.base, "verdict": verdict(row, base), "paper": cell.paper}
        for row in figures[name].values():
            row |= {key: round(row[key], 2) for key in ("mean", "spread")}
            row["seeds"] = [round(value, 2) for value in row["seeds"]]
    with open(out / "table.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("set", "cell", "steps", "fid", "spread", "base", "verdict", "paper"))
        for name, cells in figures.items():
            for cell, row in cells.items():
                last = (row.get(key, "") for key in ("base", "verdict", "paper"))
                table.writerow((name, cell, row["steps"], row["mean"], row["spread"], *last))
    draw(figures, out / "plot.png")
    print(json.dumps({**figures, "minutes": round(seconds / 60, 1)}))


if __name__ == "__main__":
    main()
