"""Write a page of HTML about runs: curves, samples, scores, settings; or about a sweep, or all runs."""

import argparse
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError
from mmlab.config.locations import refuse_address
from mmlab.runs.run import find_run


def main(argv: list[str]) -> int:
    """Write the page of some runs, of a sweep, or of all runs in a folder, and print its path.

    mmlab report llava/finetune_tiny
    mmlab report llava/align_tiny llava/finetune_tiny --out both.html
    mmlab report runs/

    Raises:
        ConfigError: no such run or sweep, or a package is missing.
    """
    parser = argparse.ArgumentParser("mmlab report", description=__doc__)
    parser.add_argument(
        "run",
        nargs="*",
        metavar="RUN",
        help="names, recipes or folders of runs, whose curves are laid over each other; or one sweep; or a folder of "
        "runs, for an index of them (default: --root)",
    )
    parser.add_argument("--root", default="runs", help="folder of the runs (default: runs)")
    parser.add_argument("--out", type=Path, help="the page (default: report.html or index.html in what it is about)")
    args = parser.parse_args(argv)
    if args.out is not None:
        refuse_address(args.out)
    if find_spec("plotly") is None or find_spec("jinja2") is None:
        raise ConfigError("mmlab report needs packages: pip install 'mmlab[report]'.")
    out, page = _page(args.run or [args.root], Path(args.root))
    out = args.out or out
    if out.is_dir():
        raise ConfigError(f"--out={out} is a folder; give the name of a page, such as {out / 'report.html'}.")
    if file := next(filter(Path.is_file, out.parents), None):
        raise ConfigError(f"{file} is a file, so that {out} cannot be in it; give another --out=.")
    from mmlab.runs.disk import write_text

    write_text(out, page)
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB): open it in a browser")
    return 0


def _page(names: list[str], root: Path) -> tuple[Path, str]:
    """The default path of a page, and its text."""
    from mmlab.report.run_facts import read_run
    from mmlab.report.run_pages import INDEX, REPORT, index_page, runs_page

    if len(names) == 1:
        if (table := _sweep_table(names[0], root)) is not None:
            sweep = _sweep(table)
            folders = [table.parent.parent.parent / row.run for row in sweep.rows]
            runs = [read_run(folder) for folder in folders if (folder / "config.yaml").is_file()]
            if not runs:
                raise ConfigError(f"None of the runs of the sweep {sweep.title} exists yet.")
            return table.with_name(REPORT), runs_page(runs, _tabulate, sweep)
        if runs := [read_run(path.parent) for path in sorted(Path(names[0]).glob("*/config.yaml"))]:
            tables = sorted(Path(names[0]).glob("sweeps/*/table.csv"))
            return Path(names[0], INDEX), index_page(Path(names[0]), runs, [_sweep(table) for table in tables])
        if names[0] == str(root):
            raise ConfigError(f"There are no runs in {root}; --root names another folder.")
    for name in names:
        if len(names) > 1 and _sweep_table(name, root) is not None:
            raise ConfigError(f"{name} is a sweep, which has a page of its own: mmlab report {name}")
    folders = list(dict.fromkeys(find_run(name, root) for name in names))
    out = folders[0] / REPORT if len(folders) == 1 else folders[0].parent / REPORT
    return out, runs_page([read_run(folder) for folder in folders], _tabulate)


def _sweep_table(name: str, root: Path) -> Path | None:
    """The table of a sweep, given by its folder or name."""
    places = [place / "table.csv" for place in (Path(name), root / name, root / "sweeps" / name)]
    return next((place for place in places if place.is_file()), None)


def _sweep(table: Path) -> Any:
    """The table of a sweep; the direction stands in the config of its runs."""
    from mmlab.report.run_facts import read_run
    from mmlab.runs.sweep.sweep_table import read_sweep

    sweep = read_sweep(table, False)
    folders = (table.parent.parent.parent / row.run for row in sweep.points)
    directions = (read_run(folder).settings.get("sweep.direction") for folder in folders if folder.is_dir())
    return replace(sweep, maximize=next(filter(None, directions), None) == "maximize")


def _tabulate(scores: dict[str, Any]) -> tuple[list[list[str]], dict[str, str]]:
    """The table of scores of answers; and metric, main number and baselines as texts."""
    from mmlab.evaluate.scores.score_table import BASELINES, cells_of, main_of, show

    main = main_of(scores)
    scores = {name: value for name, value in scores.items() if name != "samples_without_question"}
    numbers = {"questions": f"{scores['questions']:,}", "score": show(main, scores.get(main))}
    for name in BASELINES:
        numbers[name.replace("_", " ")] = show(main, (scores.get(name) or {}).get(main))
    gain = (scores.get("blind") or {}).get("gain")
    return cells_of(scores, main), {"metric": main.replace("_", " "), **numbers, "gain": show(main, gain)}
