"""`mmlab eval -m` of models that draw images: the table and the figure of their scores over the swept keys."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mmlab.config.multirun import Multirun, run_in_turn

SHOWN = ("fid", "kid", "precision", "recall")
NAMED = ("run", "root", "ema", "scores")
"""Keys on which the folder of scores depends in any case, unless `out` is given; of data it has only the last name."""


def scores_folder(cfg: DictConfig, run: Path) -> Path:
    """Return the folder of a run's scores: `out`, or one named after the data.

    Raises:
        ConfigError: it is a file.
    """
    from mmlab.runs.disk import no_file

    name = Path(cfg.data.path).name + (f"-ema{cfg.ema:g}" if cfg.ema is not None else "")
    standard = Path(cfg.scores).parent / "repeated" if cfg.scores else run / "eval" / name
    return no_file(Path(cfg.out or standard))


def sweep(multirun: Multirun, task: Callable[[DictConfig], Path]) -> None:
    """Score each point in turn, in a folder of its own, then write `table.csv` and `table.png`, and print the table.

    The smallest FID is first.

    Args:
        multirun: the command line.
        task: scores one point; returns the folder of its scores.

    Raises:
        ConfigError: a point's config is invalid; all are checked before the first is scored.
        RunError: some points failed; the others were scored.
    """
    from mmlab.runs.run import find_run

    points = iter([multirun.own(point) for batch in multirun.grid() for point in batch])
    rows: list[tuple[dict[str, str], str, dict[str, Any] | None]] = []
    places: list[DictConfig] = []

    def scored(cfg: DictConfig) -> None:
        swept = {key: value for key, _, value in (override.partition("=") for override in next(points))}
        rows.append((swept, str(cfg.run), None))
        places.append(cfg)
        named = ("out",) if cfg.out else NAMED
        if own := [f"{key}{value}" for key, value in swept.items() if key not in named]:
            folder = scores_folder(cfg, find_run(cfg.run, cfg.root))
            cfg.out = str(folder.with_name("-".join([folder.name, *own]).replace("/", "-")))
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
