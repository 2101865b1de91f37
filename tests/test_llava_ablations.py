"""The figures of the ablation experiment, computed from made-up sweeps."""

import csv
import json
import subprocess
import sys
from pathlib import Path

FIGURES = Path(__file__).parent.parent / "experiments" / "llava_ablations" / "figures.py"
KINDS = ("conversation", "detail_description", "complex_reasoning")


def write(sweeps: Path, name: str, values: dict[str, list[float]], metrics: list[str]) -> None:
    """Write a sweep's table: all metrics of a point have its recipe's value for the seed; one point failed."""
    folder = sweeps / f"llava_ablations_{name}"
    folder.mkdir(parents=True)
    with (folder / "table.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["experiment", "seed", "run", "status", "steps", *metrics])
        for recipe, per_seed in values.items():
            for seed, value in reversed(list(enumerate(per_seed))):
                page = f"llava_ablations/{recipe}"
                rows.writerow([page, seed, "run", "complete", 3, *[value] * len(metrics)])
        rows.writerow(["llava_ablations/best", 9, "run", "failed", "", *[""] * len(metrics)])


def test_a_differences_sign_is_compared_with_the_papers(tmp_path):
    best = [0.90, 0.91, 0.92]
    arms = {"layer": ("last_layer", [0.90, 0.91, 0.91]), "order": ("answer_first", [0.80, 0.81, 0.82])}
    arms["alignment"] = ("no_align", [0.95, 0.96, 0.97])
    for name, (recipe, values) in arms.items():
        write(tmp_path, name, {"best": best, recipe: values}, ["val/accuracy", "val/accuracy/IMG"])
    types = {"all_types": [0.8, 0.8], "detail_complex": [0.7, 0.7], "conversation_some": [0.9, 0.9]}
    types |= {"conversation": [0.8, 0.7], "align": [0.1, 0.1]}
    write(tmp_path, "types", types, ["val/facts", *(f"val/facts/{kind}" for kind in KINDS)])
    done = subprocess.run([sys.executable, FIGURES, tmp_path, "90"], capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    figures = json.loads(line)
    assert figures["best"] == {"mean": 91.0, "spread": 1.0, "seeds": [90.0, 91.0, 92.0], "with_picture": 91.0}
    signs = {name: (figures[name]["difference"], figures[name]["same_sign"]) for name in arms}
    assert signs == {"layer": (-0.33, "within spread"), "order": (-10.0, True), "alignment": (5.0, False)}
    assert figures["order"]["paper"] == -1.15 and figures["minutes"] == 1.5
    for kind in (*KINDS, "all"):
        rows = {name: row[kind] for name, row in figures["types"].items()}
        assert {name: row.get("same_sign") for name, row in rows.items()} == {
            "all_types": None,
            "detail_complex": True,
            "conversation_some": False,
            "conversation": "within spread",
            "align": True,
        }
    assert figures["types"]["align"]["all"]["paper"] == round(21.5 - 85.1, 2)
