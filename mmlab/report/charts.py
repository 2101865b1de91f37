"""The charts of a report, as JSON for plotly.js.

plotly reads texts as a kind of HTML, so every text from a run, its config or its data goes through `plain`.
"""

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import qualitative, sample_colorscale

from mmlab.report.run_facts import Curve, RunFacts
from mmlab.runs.sweep.sweep_table import SEED, SweepTable

INK, FAINT, LINE, GOOD = "#1c2330", "#667085", "#e4e7ec", "#2e7d32"
FONT = 'system-ui, "DejaVu Sans", sans-serif'
_POINTS = 400_000  # of all curves of a page
_FEWEST, _MOST = 150, 2000  # points of a curve
_FEW = 8  # runs up to which a noisy curve is shown behind its mean
_NOISY = 60  # points from which a training metric has a mean
_SPAN = 25  # a mean is over this part of the curve
_LONGEST = 40  # characters of a name
_SHADES = [[0.0, "#2b1a6b"], [0.5, "#c2417c"], [1.0, "#f3a847"]]

TITLES = {
    "train/lr": "learning rate",
    "train/grad_norm": "gradient norm",
    "perf/samples_per_s": "samples per second",
    "perf/tokens_per_s": "tokens per second",
    "perf/mfu": "model FLOPs utilization (MFU)",
    "perf/data_wait": "share of time waiting for data",
    "perf/memory_gib": "peak memory in GiB",
    "data/replaced": "replaced samples",
}
_ORDER = ("train/loss", "val/", "train/", "perf/samples_per_s", "perf/tokens_per_s", "perf/mfu", "perf/", "data/")


def plain(text: str) -> str:
    """A text that plotly shows as it is, shortened."""
    return escape(_cut(text), quote=False)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def colors_of(count: int) -> list[str]:
    """A color for each run: different ones for a few, a scale in their order for many."""
    if count <= len(qualitative.D3):
        return list(qualitative.D3[:count])
    return list(map(str, sample_colorscale(_SHADES, [n / (count - 1) for n in range(count)])))


def curve_charts(runs: Sequence[RunFacts], colors: Sequence[str]) -> tuple[list[tuple[str, str, str]], str]:
    """A chart for every metric, with the curves of all runs.

    Returns:
        (title, metric, JSON) of each chart, and a sentence about what the curves leave out.
    """
    # Of a single value there is no curve; the table of the runs has it.
    names = sorted({name for run in runs for name, curve in run.curves.items() if len(curve[0]) > 1}, key=_place)
    count = sum(len(run.curves) for run in runs)
    most = min(_MOST, max(_FEWEST, _POINTS // max(1, count)))
    longest = max((len(steps) for run in runs for steps, _ in run.curves.values()), default=0)
    noisy = {name for run in runs for name in names if name in run.curves and _is_noisy(name, run.curves[name])}
    charts = []
    for name in names:
        figure = _figure(hovermode="x unified" if len(runs) <= _FEW else "closest")
        figure.update_xaxes(title={"text": "optimizer step", "font": {"size": 11}})
        figure.update_yaxes(type="linear", exponentformat="power")
        for n, (run, color) in enumerate(zip(runs, colors, strict=True)):
            if name in run.curves:
                figure.add_traces(_lines(run.curves[name], name in noisy, plain(run.name), color, n, most, len(runs)))
        charts.append((_title(name), name, _json(figure)))
    sentences = []
    if noisy:
        means = f"Curves of training metrics are means over 1/{_SPAN} of their points"
        sentences.append(f"{means}{', with the values behind them' if len(runs) <= _FEW else ''}.")
    if longest > most:
        sentences.append(f"A curve has at most {most:,} points: the lowest and the highest of each stretch of steps.")
    return charts, " ".join(sentences)


def _title(name: str) -> str:
    group, _, rest = name.partition("/")
    words = {"train": "training ", "val": "validation "}.get(group, "") + (rest or name)
    return TITLES.get(name, words.replace("_", " ").replace("/", " "))


def _lines(curve: Curve, noisy: bool, label: str, color: str, n: int, most: int, runs: int) -> list[go.Scatter]:
    common: dict[str, Any] = {"meta": n, "name": label, "hovertemplate": "%{y:.5g}"}
    if runs > _FEW:
        common["hovertemplate"] = "step %{x}: %{y:.5g}"
    if not noisy:
        mode = "lines+markers" if len(curve[0]) < _NOISY and runs <= _FEW else "lines"
        style = {"line": {"color": color, "width": 1.6}, "marker": {"size": 4}}
        return [_scatter(thin(curve, most), mode=mode, **style, **common)]
    lines = [_scatter(thin(smooth(curve), most), mode="lines", line={"color": color, "width": 1.8}, **common)]
    if runs <= _FEW:
        behind = {"line": {"color": color, "width": 1}, "opacity": 0.25, "hoverinfo": "skip", "meta": n}
        lines.insert(0, _scatter(thin(curve, most), mode="lines", **behind))
    return lines


def thin(curve: Curve, most: int) -> Curve:
    """At most `most` finite points: the lowest and the highest of each stretch, so that no peak is lost."""
    steps, values = curve
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(steps) <= most:
        return steps, values
    edges = np.linspace(0, len(steps), most // 2 + 1).astype(int)
    kept: list[int] = []
    for low, high in pairwise(edges):
        part = values[low:high]
        kept += sorted({low + int(part.argmin()), low + int(part.argmax())})
    return steps[kept], values[kept]


def smooth(curve: Curve) -> Curve:
    """The mean over a window around each point, which is smaller at both ends."""
    steps, values = curve
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite].astype(np.float64)
    half = max(1, len(values) // (2 * _SPAN))
    places = np.arange(len(values))
    reach = np.minimum(half, np.minimum(places, places[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return steps, ((sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)).astype(np.float32)


def _is_noisy(name: str, curve: Curve) -> bool:
    return name.startswith("train/") and name != "train/lr" and len(curve[0]) >= _NOISY


def key_charts(table: SweepTable, colors: dict[str, str]) -> list[tuple[str, str]]:
    """A chart of the sweep's metric over each swept key.

    Args:
        table: of the sweep.
        colors: run → its color.

    Returns:
        (key, JSON) of each.
    """
    scored = [(row, value) for row in table.rows if (value := table.value(row)) is not None]
    keys = [key for key in table.swept if key != SEED or table.swept == [SEED]] if scored else []
    charts = []
    for key in keys:
        figure = _figure(hovermode="closest")
        rows = [(row, value) for row, value in scored if key in row.swept]
        axis = _axis([row.swept[key] for row, _ in rows])
        figure.update_xaxes(title={"text": plain(key)}, exponentformat="power", **axis.settings)
        figure.update_yaxes(title={"text": plain(table.metric)}, exponentformat="power")
        settings = [s for s in table.settings if key in s.swept and s.mean(table.metric) is not None]
        if settings:
            spread = [s.spread(table.metric) or 0 for s in settings]
            figure.add_scatter(
                x=[axis.at(s.swept[key]) for s in settings],
                y=[s.mean(table.metric) for s in settings],
                error_y={"type": "data", "array": spread, "color": FAINT},
                mode="markers",
                marker={"symbol": "line-ew-open", "size": 22, "color": INK},
                hovertemplate="mean %{y:.5g} ± %{error_y.array:.2g}<extra></extra>",
            )
        figure.add_scatter(
            x=[axis.at(row.swept[key]) for row, _ in rows],
            y=[value for _, value in rows],
            mode="markers",
            marker={
                "size": [13 if row is table.rows[0] else 8 for row, _ in rows],
                "symbol": ["star" if row is table.rows[0] else "circle" for row, _ in rows],
                "color": [colors.get(row.run, FAINT) for row, _ in rows],
            },
            customdata=[_label(row.swept) for row, _ in rows],
            hovertemplate="%{customdata}<br>%{y:.5g}<extra></extra>",
        )
        charts.append((key, _json(figure)))
    return charts


def parallel_chart(table: SweepTable) -> str | None:
    """Parallel coordinates of the swept keys and the metric; None without two keys or without a scored point."""
    scored = [(row, value) for row in table.rows if (value := table.value(row)) is not None]
    if not scored or len(table.swept) < 2:
        return None
    dimensions = []
    for key in table.swept:
        texts = [row.swept.get(key, "–") for row, _ in scored]
        axis = _axis(texts)
        dimensions.append({"label": _brief(key), **axis.dimension(texts)})
    values = [value for _, value in scored]
    dimensions.append({"label": _brief(table.metric), "values": values})
    best, worst = (max(values), min(values)) if table.maximize else (min(values), max(values))
    shades = _SHADES if best <= worst else [[1 - at, color] for at, color in reversed(_SHADES)]
    line = {"color": values, "colorscale": shades, "cmin": min(values), "cmax": max(values), "showscale": True}
    figure = go.Figure(
        go.Parcoords(dimensions=dimensions, line=line, labelfont={"size": 13}, tickfont={"size": 12}, labelside="top"),
        {"margin": {"l": 90, "r": 60, "t": 60, "b": 30}, "height": 420, "font": {"color": INK, "family": FONT}},
    )
    return _json(figure)


class _axis:
    """Swept values on an axis: numbers by size, over decades by their logarithm; anything else by name.

    Args:
        texts: the values, as they were written on the command line.
    """

    def __init__(self, texts: Sequence[str]):
        numbers = [number for text in texts if (number := _number(text)) is not None]
        self.numeric = len(numbers) == len(texts)
        self.log = self.numeric and min(numbers) > 0 and max(numbers) / min(numbers) >= 20
        self.names = sorted(set(texts), key=lambda text: (_number(text) or 0.0, text))
        ticks = self.numeric and len(self.names) <= 8
        self.settings: dict[str, Any] = {"type": "log" if self.log else "linear"}
        if ticks or not self.numeric:
            labels = {"tickvals": [self.at(name) for name in self.names], "ticktext": [plain(n) for n in self.names]}
            self.settings |= {**labels, "tickmode": "array"}

    def at(self, text: str) -> float:
        return float(text) if self.numeric else float(self.names.index(text))

    def dimension(self, texts: Sequence[str]) -> dict[str, Any]:
        """The values and ticks of an axis of parallel coordinates, which has no logarithmic one."""
        scale = math.log10 if self.log else float
        names = self.names if len(self.names) <= 12 else [self.names[0], self.names[-1]]
        # The only texts that plotly shows as they are.
        ticks = {"tickvals": [scale(self.at(name)) for name in names], "ticktext": [_cut(name) for name in names]}
        return {"values": [scale(self.at(text)) for text in texts], **ticks}


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _label(swept: dict[str, str]) -> str:
    return "<br>".join(plain(f"{key}={value}") for key, value in swept.items())


def _brief(key: str) -> str:
    """The last two words of a dotted key."""
    return plain(".".join(key.split(".")[-2:]))


def _scatter(curve: Curve, **options: Any) -> go.Scatter:
    return go.Scatter(x=curve[0], y=curve[1], **options)


def _figure(**layout: Any) -> go.Figure:
    axis = {"gridcolor": LINE, "zeroline": False, "linecolor": LINE, "automargin": True}
    return go.Figure(
        layout={
            "template": None,
            "showlegend": False,
            "height": 290,
            "margin": {"l": 56, "r": 12, "t": 26, "b": 40},
            "plot_bgcolor": "white",
            "paper_bgcolor": "white",
            "font": {"color": INK, "size": 12, "family": FONT},
            "hoverlabel": {"namelength": -1},
            "xaxis": axis,
            "yaxis": axis,
            **layout,
        }
    )


def _place(name: str) -> tuple[int, str]:
    """The place of a metric on the page: as `_ORDER` says, then by name."""
    return next((n for n, start in enumerate(_ORDER) if name.startswith(start)), len(_ORDER)), name


def _json(figure: go.Figure) -> str:
    """JSON that cannot end the element of a page that it stands in."""
    text = figure.to_json() or ""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
