"""Draw the panels of `cost_growth.py`: cost_plot.py FOLDER draws its cost_growth.json again."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

LABELS = {"sdpa": "dense mask", "small LLaVA": "a small LLaVA"}
STYLES = {"sdpa": "C1o-", "blocks": "C0o-", "small LLaVA": "C0o-", "DDP": "C0o-", "FSDP": "C2o-"}
STYLES |= {"logits, trained": "C1o-", "logits, frozen": "C3s--", "chunks, trained": "C0o-", "chunks, frozen": "C2s--"}
TITLES = {
    "dataset": ("Time: samples in the index", "samples"),
    "sequence": ("Time: length of a packed row", "tokens, in texts of 256"),
    "pictures": ("Time: pictures of a sample", "pictures, 64 tokens each"),
    "ranks": ("Time: ranks (gloo), each with a row of its own", "ranks"),
    "sequence_memory": ("Memory: length of a packed row", "tokens, in texts of 256"),
    "vocabulary_memory": ("Memory: output layer and loss of 512 tokens", "tokens in the vocabulary"),
}
LINEAR = ("pictures", "ranks")
"""Panels with linear axes."""


def draw(panels: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One PNG of small multiples."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 3, figsize=(13.5, 8), layout="constrained")
    for axis, (name, (title, label)) in zip(axes.flat, TITLES.items(), strict=True):
        points = panels[name]
        for way in dict.fromkeys(point["way"] for point in points):
            chosen = [point for point in points if point["way"] == way]
            if "bytes" in points[0]:
                line(axis, chosen, way, "bytes", 1e-6)
            elif name == "ranks":
                line(axis, chosen, way, "elapsed_s", 1e3, ", elapsed")
                line(axis, chosen, way, "cpu_s", 1e3, ", CPU time")
            else:
                line(axis, chosen, way, "cpu_s", 1e3)
        unit = "ms a step" if name == "ranks" else "ms a step, CPU time of one thread"
        axis.set(title=title, xlabel=label, ylabel="MB at the peak of a step" if "bytes" in points[0] else unit)
        scale(axis, name, sorted({point["x"] for point in points}))
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8.5)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def scale(axis: Any, name: str, ticks: list[int]) -> None:
    """Logarithmic axes where lines differ in their power; otherwise from 0."""
    if name not in LINEAR:
        axis.set_xscale("log")
    if name in LINEAR or name == "dataset":
        bottom, top = 0, axis.get_ylim()[1]
        axis.set_ylim(bottom, top * 1.35)  # room for the legend
    else:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if name == "ranks":
        axis.set_xlim(ticks[0] - 0.5, ticks[-1] + 0.5)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def line(axis: Any, points: list[dict[str, Any]], way: str, key: str, unit: float, suffix: str = "") -> None:
    """Medians, with the spread of the rounds as bars; the label states the growth from the first to the last point."""
    x = [point["x"] for point in points]
    middle, least, most = ([point[key][name] * unit for point in points] for name in ("median", "least", "most"))
    bars = [[m - low for m, low in zip(middle, least, strict=True)], [h - m for m, h in zip(middle, most, strict=True)]]
    label = f"{LABELS.get(way, way)}{suffix}"
    if x[-1] > x[0]:
        label += f": {middle[-1] / middle[0]:.2g}× for {x[-1] / x[0]:,.0f}×"
    style = STYLES[way].replace("-", ":") if suffix == ", CPU time" else STYLES[way]
    hollow = {"markerfacecolor": "none"} if "s" in style or ":" in style else {}
    axis.errorbar(x, middle, bars, fmt=style, label=label, capsize=3, markersize=5, linewidth=1.5, **hollow)


def short(value: float) -> str:
    for size, least in ((1_000_000, 1_000_000), (1000, 1000), (1024, 10_000)):
        if value >= least and value % size == 0:
            return f"{value / size:.0f}{'M' if size == 1_000_000 else 'k'}"
    return f"{value:,.0f}"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    draw(json.loads((folder / "cost_growth.json").read_text())["panels"], folder / "cost_growth.png")
