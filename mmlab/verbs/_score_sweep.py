"""`mmlab eval -m` of models that draw images: the table and the figure of their scores over the swept keys."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mmlab.config.multirun import Multirun, run_in_turn

SHOWN = ("fid", "kid", "precision", "recall")


def sweep(multirun: Multirun, task: Callable[[DictConfig], Path]) -> None:
    """Score each point in turn, then write `table.csv` and `table.png`, and print the table, the smallest FID first.

    Args:
        multirun: the command line.
        task: scores one point; returns the folder of its scores.

    Raises:
        ConfigError: a point's config is invalid; all are checked before the first is scored.
        RunError: some points failed; the others were scored.
    """
    points = iter([multirun.own(point) for batch in multirun.grid() for point in batch])
    rows: list[tuple[dict[str, str], str, dict[str, Any] | None]] = []
    places: list[DictConfig] = []

    def scored(cfg: DictConfig) -> None:
        swept = {key: value for key, _, value in (override.partition("=") for override in next(points))}
        rows.append((swept, str(cfg.run), None))
        places.append(cfg)
        folder = task(cfg)
        rows[-1] = swept, str(cfg.run), json.loads((folder / "scores.json").read_text(encoding="utf-8"))

    try:
        run_in_turn(multirun, scored)
    finally:
        if any(scores and "fid" in scores for *_, scores in rows):
            _report(rows, places[0])


def _report(rows: list[tuple[dict[str, str], str, dict[str, Any] | None]], first: DictConfig) -> None:
    from mmlab.runs.sweep.sweep_picture import write_sweep
    from mmlab.runs.sweep.sweep_table import Row, SweepTable

    points = []
    for swept, run, scores in rows:
        numbers = {name: scores[name] for name in SHOWN if name in scores} if scores else {}
        points.append(Row(swept, run, "complete" if scores else "failed", numbers))
    keys = dict.fromkeys(key for swept, *_ in rows for key in swept)
    same = {"run": first.run, "data.path": Path(first.data.path).name}
    name = "-".join(["eval", *(value for key, value in same.items() if key not in keys), *keys]).replace("/", "-")
    table, folder = SweepTable(name, "fid", maximize=False, points=points), Path(first.root, "sweeps", name)
    folder.mkdir(parents=True, exist_ok=True)
    write_sweep(table, folder)
    print(table.text())
    print(f"table: {folder / 'table.csv'}, {folder / 'table.png'}")
