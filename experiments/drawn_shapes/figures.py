"""Judge samples of drawn shapes and print the figures as one JSON object: figures.py SAMPLES MINUTES.

SAMPLES has a folder of `mmlab sample` for each recipe; a sheet of each, <recipe>.png, goes to the current folder.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
from classifier import classify, train
from likeness import Fit, Scenes, fits, real_scenes
from PIL import Image, ImageOps

from mmlab.data.sources.scenes import COLORS, KINDS

HUE = 0.17
"""Largest distance of an object's color from its palette's, of 1.73 for black and white; the closest two are 0.38."""
LIKE = 0.2
"""Largest error of the closest drawing, see `Fit`; real scenes reach 0.08, and 0.10 to 0.5 as another shape."""
SHOWN = (16, 6)
"""Columns and rows of a sheet."""
STEPS = {
    "class": ("shards", "kl", "latents", "class"),
    "text": ("shards", "kl", "latents", "text"),
    "prior": ("shards", "vqgan", "codes", "prior"),
}
"""What a recipe needs, from raw scenes on."""


def read_samples(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pixels, and the asked kinds and colors; -1 for any color."""
    pictures = json.loads((folder / "samples.json").read_text())["pictures"]
    pixels = np.stack([np.asarray(Image.open(folder / one["file"]).convert("RGB")) for one in pictures])
    words = [one["condition"].split() for one in pictures]
    kinds = [KINDS.index(one[-1]) for one in words]
    colors = [list(COLORS).index(one[-2]) if len(one) > 1 else -1 for one in words]
    return pixels / np.float32(255), np.array(kinds), np.array(colors)


def judge(network, pixels: np.ndarray, kinds: np.ndarray, colors: np.ndarray) -> tuple[dict, np.ndarray, list[Fit]]:
    """Return rates, whether each picture is accepted by the classifier, and the closest drawing of each."""
    seen_kinds, seen_colors = classify(network, pixels)
    found = fits(pixels, kinds, np.where(colors < 0, seen_colors, colors))
    pure = np.array([one.hue < HUE for one in found])
    kind, color = seen_kinds == kinds, np.where(colors < 0, pure, seen_colors == colors)
    like = np.array([one.error < LIKE for one in found]) & pure
    rates = {
        "samples": len(pixels),
        "kind": kind.mean(),
        "color": color.mean(),
        "kind_and_color": (kind & color).mean(),
        "and_like_a_drawing": (kind & color & like).mean(),
        "median_error": np.median([one.error for one in found]),
    }
    return rates, kind & color, found


def spread(found: list[Fit], real: list[Fit]) -> dict[str, float]:
    """Kolmogorov-Smirnov distances of places and sizes from those of real scenes: 0 equal, 1 disjoint."""
    distances = {}
    for name in ("x", "y", "radius"):
        ours, theirs = (np.sort([getattr(one, name) for one in some]) for some in (found, real))
        at = np.concatenate([ours, theirs])
        shares = [np.searchsorted(some, at, "right") / len(some) for some in (ours, theirs)]
        distances[name] = float(np.abs(shares[0] - shares[1]).max())
    return distances


def sheet(pixels: np.ndarray, accepted: np.ndarray, path: str) -> None:
    """Samples spread over all conditions; those that the classifier refuses have a red edge."""
    columns, rows = SHOWN
    chosen = np.linspace(0, len(pixels) - 1, columns * rows).astype(int)
    page = Image.new("RGB", (72 * columns, 72 * rows), "white")
    for n, i in enumerate(chosen):
        picture = Image.fromarray((255 * pixels[i]).round().astype(np.uint8)).resize((64, 64), Image.Resampling.NEAREST)
        edged = ImageOps.expand(picture, 3, "white" if accepted[i] else "red")
        page.paste(edged, (72 * (n % columns) + 1, 72 * (n // columns) + 1))
    page.save(path, optimize=True)


def psnr(run: str) -> float:
    """The last PSNR of a first stage on held-out scenes."""
    with open(f"runs/{run}/metrics.csv", newline="") as file:
        values = [float(row["val/psnr"]) for row in csv.DictReader(file) if row.get("val/psnr")]
    return values[-1]


def main(samples: str, seconds_file: str) -> None:
    held_out: Scenes = real_scenes(1000, "held out")
    network = train(real_scenes(8000, "classifier"))
    rates, _, real = judge(network, held_out.pixels, held_out.kinds, held_out.colors)
    figures = {"real": rates}
    for folder in sorted(path for path in Path(samples).iterdir() if path.is_dir()):
        pixels, kinds, colors = read_samples(folder)
        order = np.lexsort((colors, kinds))
        pixels, kinds, colors = pixels[order], kinds[order], colors[order]
        rates, accepted, found = judge(network, pixels, kinds, colors)
        good = [one for one, yes in zip(found, accepted, strict=True) if yes]
        figures[folder.name] = rates | ({"spread": spread(good, real)} if len(good) > 100 else {})
        if -1 in colors:
            shares = np.bincount(classify(network, pixels)[1], minlength=len(COLORS)) / len(pixels)
            figures[folder.name]["rarest_and_commonest_color"] = [shares.min(), shares.max()]
        sheet(pixels, accepted, f"{folder.name}.png")
    seconds = {name: int(value) for name, value in map(str.split, Path(seconds_file).read_text().splitlines())}
    figures["psnr"] = {"kl": psnr("ldm-first_stage_kl_tiny"), "vqgan": psnr("taming-vqgan_tiny")}
    figures["step_minutes"] = {name: value / 60 for name, value in seconds.items()}
    figures["minutes"] = {name: sum(seconds[step] for step in steps) / 60 for name, steps in STEPS.items()}
    print(json.dumps(json.loads(json.dumps(figures, default=float), parse_float=lambda text: round(float(text), 4))))


if __name__ == "__main__":
    main(*sys.argv[1:])
