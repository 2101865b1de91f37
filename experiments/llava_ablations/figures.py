"""Print the figures of one run of run.sh as one JSON object: figures.py SWEEPS SECONDS."""

import csv
import json
import sys
from pathlib import Path
from statistics import fmean, stdev

sweeps, seconds = Path(sys.argv[1]), int(sys.argv[2])
PAPER = {  # ScienceQA accuracy minus that of the best variant, 90.92 (Visual Instruction Tuning, table 8)
    "layer": ("last_layer", -0.96),
    "order": ("answer_first", -1.15),
    "alignment": ("no_align", -5.11),
}
KINDS = ("conversation", "detail_description", "complex_reasoning")
PAPER_TYPES = {  # LLaVA-Bench (COCO) by response type and overall (table 4)
    "all_types": (83.1, 75.3, 96.5, 85.1),
    "detail_complex": (81.5, 73.3, 90.8, 81.9),
    "conversation_some": (81.0, 68.4, 91.5, 80.5),
    "conversation": (76.5, 59.8, 84.9, 73.8),
    "align": (22.0, 24.0, 18.5, 21.5),
}


def read(name: str) -> dict[str, list[dict[str, str]]]:
    """The points of a sweep by recipe, ordered by seed."""
    with open(sweeps / f"llava_ablations_{name}" / "table.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "complete"]
    found: dict[str, list[dict[str, str]]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        found.setdefault(row["experiment"].rpartition("/")[2], []).append(row)
    return found


def summed_up(points: list[dict[str, str]], metric: str) -> dict:
    values = [100 * float(row[metric]) for row in points]
    spread = stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(fmean(values), 2), "spread": round(spread, 2), "seeds": [round(value, 2) for value in values]}


def beside(row: dict, base: dict, paper: float) -> dict:
    """The row with its difference from the base and the paper's; no sign if the difference is within the spread."""
    difference = row["mean"] - base["mean"]
    spread = (row["spread"] ** 2 + base["spread"] ** 2) ** 0.5
    same = "within spread" if abs(difference) <= spread else (difference > 0) == (paper > 0)
    return {**row, "difference": round(difference, 2), "paper": round(paper, 2), "same_sign": same}


figures: dict = {"seeds": 3}
for name, (variant, paper) in PAPER.items():
    points = read(name)
    base = summed_up(points["best"], "val/accuracy")
    figures.setdefault("best", {**base, "with_picture": summed_up(points["best"], "val/accuracy/IMG")["mean"]})
    row = beside(summed_up(points[variant], "val/accuracy"), base, paper)
    figures[name] = {**row, "with_picture": summed_up(points[variant], "val/accuracy/IMG")["mean"]}

points = read("types")
metrics = {**{kind: f"val/facts/{kind}" for kind in KINDS}, "all": "val/facts"}
base = {kind: summed_up(points["all_types"], metric) for kind, metric in metrics.items()}
figures["types"] = {}
for name, published in PAPER_TYPES.items():
    rows = {kind: summed_up(points[name], metric) for kind, metric in metrics.items()}
    papers = dict(zip(metrics, published, strict=True))
    if name != "all_types":
        rows = {
            k: beside(row, base[k], papers[k] - PAPER_TYPES["all_types"][i]) for i, (k, row) in enumerate(rows.items())
        }
    figures["types"][name] = rows
print(json.dumps({**figures, "minutes": round(seconds / 60, 1)}))
