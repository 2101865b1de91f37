"""Folders of runs as training leaves them, with texts that would be markup if they were not escaped."""

import json
import math
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from mmlab.runs.finished_runs import DONE
from mmlab.runs.sweep.sweep_table import Row, SweepTable

MARKUP = "<script>alert(1)</script><b>bold</b>%{x}&lt;"
"""Shown as it is wherever a text comes from a run or its data."""
METRICS = ("train/loss", "train/lr", "train/grad_norm", "perf/samples_per_s", "perf/mfu", "perf/data_wait")


def make_run(
    root: Path, name: str, steps: int = 40, rate: float = 1e-3, texts: str = "plain", sheets: int = 0, **files: Any
) -> Path:
    """Write a finished run.

    Args:
        root: folder of runs.
        name: of the run.
        steps: each one is a row of its metrics.
        rate: its learning rate, on which its losses depend.
        texts: stands in its config, its command line, its data report and its scores.
        sheets: number of sample sheets, the first one red and the others greener.
        **files: further files by their stem, as JSON.
    """
    folder = root / name
    (folder / "samples").mkdir(parents=True)
    config = {
        "run": {"name": name, "root": str(root), "dir": str(folder), "sweep": None},
        "optim": {"lr": rate},
        "trainer": {"max_steps": steps},
        "sweep": {"metric": "val/loss", "direction": "minimize"},
        "data": {"root": texts},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "overrides.txt").write_text(f"experiment=llava/align_tiny\noptim.lr={rate}\ndata.root={texts}\n")
    lines = [f"step,{','.join(METRICS)},val/loss"]
    for step in range(1, steps + 1):
        loss = 4 / (1 + 500 * rate * step / steps) + 0.2 * math.sin(37 * step)
        value = f"{loss:.6f}" if step % 20 == 0 else ""
        lines.append(f"{step},{loss:.6f},{rate:.6g},{1 + loss:.5f},{90 + step % 7},0.41,0.02,{value}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    done = {"steps": steps, "train/loss": loss, "val/loss": loss}
    code = [{"starts": ["2026-01-02T03:04:05+0000"], "commit": "0123456789abcdef", "versions": {"torch": "2.13"}}]
    source = {"seen": 8, "share": 1.0, "replaced": 1}
    bad = [{"source": texts, "key": texts, "reason": "image", "message": texts}]
    report = {"train": {"seen": 8, "sources": {texts: source}, "types": {}, "bad": bad, "bad_left_out": 0}}
    for stem, content in {Path(DONE).stem: done, "code": code, "data_report": report, **files}.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    for n in range(sheets):
        Image.new("RGB", (64, 32), (255 - 60 * n, 60 * n, 0)).save(folder / "samples" / f"step-{10 * (n + 1)}.png")
    return folder


def add_scores(run: Path, texts: str = "plain", questions: int = 4) -> None:
    """Scores of answers with a blind baseline, and predictions, half of which are right."""
    row = {"questions": questions, "accuracy": 0.5}
    scores = {
        "metric": "exact",
        **row,
        "types": {texts: row},
        "blind": {**row, "accuracy": 0.25, "gain": 0.25, "types": {}},
    }
    folder = run / "eval" / texts.replace("/", "_")[:40]
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(scores))
    common = {"key": "s0", "type": texts, "question": texts, "answer": texts, "prediction": texts}
    rows = [{**common, "right": n % 2 == 0, "score": float(n % 2 == 0)} for n in range(questions)]
    (folder / "predictions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def make_sweep(root: Path, count: int, steps: int = 40, kind: str = "linear", **options: Any) -> Path:
    """Write a sweep over the learning rate, a name (`kind` and `mlp`) and the seed; its last point has failed."""
    rows = []
    for n in range(count):
        rate, connector = 10 ** (-4 + 3 * (n // 4) / count), (kind, "mlp")[n // 2 % 2]
        swept = {"optim.lr": f"{rate:.3g}", "model/connector": connector, "seed": str(n % 2)}
        if n == count - 1:
            rows.append(Row(swept, f"point{n}", "failed", {}))
            continue
        folder = make_run(root, f"point{n}", steps, rate, **options)
        rows.append(Row(swept, folder.name, "complete", json.loads((folder / DONE).read_text())))
    folder = root / "sweeps" / "rates"
    folder.mkdir(parents=True)
    (folder / "table.csv").write_text(SweepTable("rates", "val/loss", False, rows).csv())
    return folder
