"""Pages of HTML about runs, which need no other file and no network.

All texts are escaped by the templates; those of charts by `mmlab.report.charts`, since plotly reads them as HTML.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader

from mmlab.report.run_facts import Evaluation, RunFacts, Table, Tabulate, differing, shortened
from mmlab.report.thumbnails import films, thumbnail
from mmlab.runs.sweep.sweep_table import SweepTable, short

REPORT = "report.html"
INDEX = "index.html"
_FILMS = 4  # runs whose validation samples are shown
_DETAILED = 12  # runs whose details are shown
_COLUMNS = 8  # metrics in a table of runs
_INDEXED = 3  # metrics in the index
_SHEETS = 8  # pictures of evaluations of a page


def runs_page(runs: Sequence[RunFacts], tabulate: Tabulate, sweep: SweepTable | None = None) -> str:
    """The page of one run, of several over each other, or of a sweep.

    Args:
        runs: at least one; those of a sweep best first.
        tabulate: see `RunFacts.evaluations`.
        sweep: its table.
    """
    from plotly.offline import get_plotlyjs

    from mmlab.report.charts import colors_of, curve_charts, key_charts, parallel_chart

    colors = colors_of(len(runs))
    colors_by_run = {run.name: color for run, color in zip(runs, colors, strict=True)}
    charts, curves_note = curve_charts(runs, colors)
    detailed = list(runs[:_DETAILED])
    evaluations = [run.evaluations(tabulate) for run in detailed]
    with_sheets = [(n, run) for n, run in enumerate(runs) if run.sheets]
    found, films_note = films([run for _, run in with_sheets[:_FILMS]])
    if len(with_sheets) > _FILMS:
        films_note = f"Samples of {_FILMS} of {len(with_sheets)} runs. {films_note}"
    what = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return _render(
        "runs.html",
        title=sweep.title if sweep else ", ".join(run.name for run in runs[:4]) + ", …" * (len(runs) > 4),
        subtitle=f"mmlab, {'a sweep of ' * bool(sweep)}{what}, as of {time.strftime('%Y-%m-%d %H:%M')}",
        runs=runs,
        colors=colors,
        colors_by_run=colors_by_run,
        sweep=sweep,
        links={run.name: f"#run-{n}" for n, run in enumerate(detailed)},
        key_charts=key_charts(sweep, colors_by_run) if sweep else [],
        parallel=parallel_chart(sweep) if sweep else None,
        last=_last(runs, _COLUMNS),
        differing=differing(runs),
        scores=[(n, one.name, one.main) for n, some in enumerate(evaluations) for one in some if one.main],
        charts=charts,
        curves_note=curves_note,
        films=[(n, film) for (n, _), film in zip(with_sheets, found, strict=False) if film],
        steps=sorted({step for film in found for step in film}),
        films_note=films_note,
        detailed=detailed,
        evaluations=evaluations,
        sheets_of=_Sheets(),
        sources_table=_sources_table,
        count=_count,
        faults=[fault for run in runs for fault in run.faults],
        plotly=get_plotlyjs(),
        zip=zip,
    )


def index_page(root: Path, runs: Sequence[RunFacts], sweeps: Sequence[SweepTable]) -> str:
    """The table of all runs and sweeps in a folder, the newest first, with links to the pages that exist."""
    folders = [(sweep, f"sweeps/{sweep.title}/{REPORT}") for sweep in sweeps]
    ordered = sorted(runs, key=lambda run: run.changed, reverse=True)
    return _render(
        "index.html",
        title=f"Runs in {root}",
        subtitle=f"mmlab, {len(runs)} runs, {len(sweeps)} sweeps, as of {time.strftime('%Y-%m-%d %H:%M')}",
        runs=[(run, _link(root, f"{run.name}/{REPORT}")) for run in ordered],
        sweeps=[
            {"table": table, "link": _link(root, page), "best": table.value(table.rows[0]) if table.rows else None}
            for table, page in folders
        ],
        last=_last(runs, _INDEXED),
        faults=[fault for run in runs for fault in run.faults],
    )


def _render(template: str, **values: Any) -> str:
    loader = FileSystemLoader(Path(__file__).parent / "pages")
    # Files of other versions may lack what a template shows.
    pages = Environment(
        loader=loader, autoescape=True, undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return pages.get_template(template).render(short=short, shortened=shortened, **values)


def _link(root: Path, page: str) -> str:
    """The relative address of a page that exists; otherwise empty."""
    from urllib.parse import quote

    return quote(page) if (root / page).is_file() else ""


def _last(runs: Sequence[RunFacts], count: int) -> list[str]:
    """The names of the last metrics that most of the runs have, the losses first."""
    names = Counter(name for run in runs for name in run.last)
    return sorted(names, key=lambda name: (not name.endswith("/loss"), -names[name], name))[:count]


def _sources_table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Counters of sources, types or buckets as a table."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    names = [name for name in names if not name.startswith(("type/", "bucket/"))]  # they have tables of their own
    names.sort(key=lambda name: (not name.startswith(("seen", "share")), name))
    cells = [[name, *(_count(row.get(column)) for column in names)] for name, row in rows.items()]
    return [["", *(name.replace("_", " ") for name in names)], *cells]


def _count(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2%}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else shortened(value)


class _Sheets:
    """The pictures of evaluations as data URLs, up to `_SHEETS` of a page."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, evaluation: Evaluation) -> list[tuple[str, str]]:
        some = evaluation.sheets[: max(0, _SHEETS - self.count)]
        self.count += len(some)
        return [(path.name, url) for path in some if (url := thumbnail(path))]
