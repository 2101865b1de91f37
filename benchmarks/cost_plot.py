"""Draw the panels of `cost_growth.py`: cost_plot.py FOLDER draws its cost_growth.json again."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

LABELS = {"sdpa": "dense mask", "blocks": "blocks"}
COLORS = {"sdpa": "C1", "blocks": "C0", "small LLaVA": "C0", "DDP": "C0", "FSDP": "C2"}
COLORS |= {"logits, trained": "C1", "chunks, trained": "C0", "logits, frozen": "C1", "chunks, frozen": "C0"}
TITLES = {
    "dataset": ("Samples in the index", "samples"),
    "sequence": ("Length of a packed row", "tokens, in texts of 256"),
    "pictures": ("Pictures of a sample", "pictures, 64 tokens each"),
    "ranks": ("Ranks (gloo), each with work of its own", "ranks"),
    "sequence_memory": ("Length of a packed row", "tokens, in texts of 256"),
    "vocabulary_memory": ("Vocabulary; 512 tokens with a loss", "tokens in the vocabulary"),
}


def draw(panels: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One PNG of small multiples."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    for axis, (name, (title, label)) in zip(axes.flat, TITLES.items(), strict=True):
        points = panels[name]
        memory = "bytes" in points[0]
        key, scale = ("bytes", 1e-6) if memory else ("elapsed_s" if name == "ranks" else "cpu_s", 1e3)
        unit = "MB at the peak of a step" if memory else f"ms a step, {'elapsed' if name == 'ranks' else 'CPU time'}"
        ways = list(dict.fromkeys(point["way"] for point in points))
        for way in ways:
            line(axis, [point for point in points if point["way"] == way], way, key, scale)
        ticks = sorted({point["x"] for point in points})
        logarithmic = name != "ranks"
        axis.set(title=title, xlabel=label, ylabel=unit, xscale="log" if logarithmic else "linear")
        if name in ("sequence", "sequence_memory", "vocabulary_memory"):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        else:
            axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        if not logarithmic:
            axis.set_xlim(ticks[0] - 0.5, ticks[-1] + 0.5)
        axis.grid(alpha=0.25)
        if len(ways) > 1:
            axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def line(axis: Any, points: list[dict[str, Any]], way: str, key: str, scale: float) -> None:
    """Medians, with the spread of the rounds as bars."""
    x = [point["x"] for point in points]
    middle, least, most = ([point[key][name] * scale for point in points] for name in ("median", "least", "most"))
    bars = [[m - low for m, low in zip(middle, least, strict=True)], [h - m for m, h in zip(middle, most, strict=True)]]
    style = "--" if way.endswith("frozen") else "-"
    label, color = LABELS.get(way, way), COLORS[way]
    axis.errorbar(x, middle, bars, fmt=f"o{style}", color=color, label=label, capsize=3, markersize=4, linewidth=1.5)


def short(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size and value % size == 0:
            return f"{value / size:.0f}{letter}"
    return f"{value / 1024:.0f}Ki" if value >= 10_000 else f"{value:.0f}"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    draw(json.loads((folder / "cost_growth.json").read_text())["panels"], folder / "cost_growth.png")
