"""The cells of experiments/diffusion_ablation, and its figures, computed from a made-up sweep."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

from mmlab.config.compose import compose

FOLDER = Path(__file__).parents[1] / "experiments" / "diffusion_ablation"
CELLS = sorted(page.stem for page in (FOLDER / "conf" / "cell").glob("*.yaml"))


def cell(name: str, data: str):
    pages = f"hydra.searchpath=[file://{FOLDER / 'conf'}]"
    return compose("train", [pages, f"experiment=diffusion_ablation/{data}", f"+cell={name}"])


def test_the_sweep_has_all_cells():
    (swept,) = re.findall(r"\+cell=(\S+)", (FOLDER / "run.sh").read_text())
    assert sorted(swept.split(",")) == CELLS


def test_a_cell_differs_from_the_base_in_its_own_part():
    base = cell("v", "scenes")
    changed = {"v_min_snr": {"process"}, "edm_uncertainty": {"process", "model", "stage"}}
    changed["flow_repa"] = {"process", "model", "stage", "trainer"}
    for name, parts in changed.items():
        own = cell(name, "scenes")
        assert {key for key in own if own[key] != base[key]} - {"run", "logger", "callbacks"} == parts


def test_a_difference_counts_beyond_the_spread(tmp_path):
    sweep = tmp_path / "runs" / "sweeps" / "diffusion_ablation"
    sweep.mkdir(parents=True)
    fids = {"v": [60.0, 61.0, 62.0], "epsilon": [70.0, 70.5, 71.0], "v_min_snr": [60.0, 60.5, 61.0], "flow": [50.0] * 3}
    with (sweep / "table.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["experiment", "+cell", "seed", "run", "status", "steps", "val/fid"])
        for data in ("emoji", "scenes"):
            for name, values in fids.items():
                page = f"diffusion_ablation/{data}"
                rows.writerows([page, name, n, f"{name}-{n}", "complete", 9, fid] for n, fid in enumerate(values))
        rows.writerow(["diffusion_ablation/emoji", "flow", 3, "flow-3", "failed", "", ""])
    for n in range(3):
        scores = tmp_path / "eval" / "diffusion_ablation" / f"v-{n}" / "0.1" / "scores.json"
        scores.parent.mkdir(parents=True)
        scores.write_text(json.dumps({"fid": 58.0}))
    command = [sys.executable, FOLDER / "figures.py", tmp_path, "90"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert figures["emoji"]["v"] == {"steps": 9, "mean": 61.0, "spread": 1.0, "seeds": [60.0, 61.0, 62.0]}
    verdicts = {name: row["verdict"] for name, row in figures["emoji"].items() if name != "v"}
    assert verdicts == {
        "epsilon": "worse",
        "v_min_snr": "within spread",
        "flow": "better",
        "v_posthoc_0.1": "better",
    }
    assert (tmp_path / "plot.png").exists() and len((tmp_path / "table.csv").read_text().splitlines()) == 11
