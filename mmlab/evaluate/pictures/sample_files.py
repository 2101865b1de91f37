"""Pictures drawn on request, as files."""

from pathlib import Path

from PIL import Image
from torch import Tensor

from mmlab.data.progress_bar import progress
from mmlab.diffusion.walk import Step, Trajectory
from mmlab.evaluate.pictures.generators import PictureGenerator, ranges
from mmlab.report.sheet import as_picture, contact_sheet

GRID = 64
"""Most pictures on a grid."""
FRAMES = 8
"""Most steps that a strip shows."""


def draw_files(
    generator: PictureGenerator,
    given: dict[str, Tensor],
    words: list[str],
    seed: int,
    out: Path,
    batch_size: int = 16,
    strip: int = 4,
    title: str = "",
) -> list[str]:
    """Draw pictures, each into `<its seed>.png`, with `grid.png` of the first ones and `strip.png` of how they came.

    Args:
        generator: the model that draws.
        given: what its conditioner is given, a row for each picture.
        words: the same in words.
        seed: of the first picture, and one more for each.
        out: folder, made with the first picture.
        batch_size: pictures at a time.
        strip: rows of the strip; 0 for none.
        title: of grid and strip.

    Returns:
        The names of the pictures' files.
    """
    names = [f"{seed + n:04d}.png" for n in range(len(words))]
    labels = [f"seed {seed + n}" for n in range(len(words))]
    batches, steps = list(ranges(len(words), batch_size)), generator.steps
    bar = progress(range(len(batches) * steps), "sampling steps", len(batches) * steps)
    next(bar)
    shown: list[Tensor] = []
    rows: list[list[Tensor]] = []
    columns: list[str] = []
    for start, stop in batches:
        walked = Trajectory(FRAMES if start < strip else 0)

        def on_step(step: Step, walked: Trajectory = walked) -> None:
            walked(step)
            next(bar, None)

        seeds = list(range(seed + start, seed + stop))
        pictures = generator({name: values[start:stop] for name, values in given.items()}, seeds, on_step)
        out.mkdir(parents=True, exist_ok=True)
        for name, picture in zip(names[start:stop], pictures, strict=True):
            as_picture(picture).save(out / name)
        shown += pictures[: max(0, GRID - start)]
        if start < strip:
            columns = [generator.begins, *(f"step {number} of {steps}" for number in walked.numbers)]
            rows += way(generator, seeds[: strip - start], walked, pictures)
    across = 4 if len(shown) <= 16 else 8
    sheet(shown, words[:GRID], labels[:GRID], across, title, generator.size).save(out / "grid.png")
    if rows:
        told = [f"{label}\n{word}".strip() for label, word in zip(labels, words, strict=True)]
        texts = [text if n == 0 else "" for text, row in zip(told, rows, strict=False) for n in range(len(row))]
        title = f"{title}: {generator.on_the_way}"
        flat = [picture for row in rows for picture in row]
        sheet(flat, texts, columns * len(rows), len(columns), title, generator.size).save(out / "strip.png")
    return names


def way(generator: PictureGenerator, seeds: list[int], walked: Trajectory, pictures: Tensor) -> list[list[Tensor]]:
    """For each of the first samples, those of `seeds`, the decoded x_t from its noise to its picture."""
    states = [generator.noise(seeds), *(x[: len(seeds)] for x in walked.x[:-1])]
    columns = [*(generator.decode(state) for state in states), pictures[: len(seeds)]]
    return [list(row) for row in zip(*columns, strict=True)]


def sheet(
    pictures: list[Tensor], texts: list[str], labels: list[str], columns: int, title: str, size: int
) -> Image.Image:
    """A contact sheet on which small pictures are enlarged and large ones fit."""
    cell = min(256, max(128, size))
    return contact_sheet(pictures, texts, columns, labels=labels, title=title, cell=cell, max_lines=4)
