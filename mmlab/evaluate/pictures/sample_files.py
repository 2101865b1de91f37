"""Drawn images as files, with a grid of them and a strip of their intermediate states."""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mmlab.data.progress_bar import progress
from mmlab.diffusion.walk import Step, Trajectory
from mmlab.evaluate.pictures.generators import PictureGenerator, ranges
from mmlab.evaluate.pictures.source_images import IMAGE, MASK
from mmlab.report.contact_sheet import as_picture, contact_sheet
from mmlab.runs.disk import replacing

GRID = 64
"""Most images on a grid."""
FRAMES = 8
"""Most steps shown on a strip."""


def draw_files(
    generator: PictureGenerator,
    inputs: dict[str, Tensor],
    labels: list[str],
    seed: int,
    out: Path,
    batch_size: int = 16,
    strip: int = 4,
    title: str = "",
    on_step: Callable[[], None] | None = None,
) -> list[str]:
    """Draw images, each to `<seed>.png`, with `grid.png` of the first ones and `strip.png` of intermediate states.

    Args:
        generator: draws the images.
        inputs: of the generator, a row for each image; see `PictureGenerator`; the grid shows images to start from.
        labels: what each image is to show, in words.
        seed: of the first image, and one more for each.
        out: folder, created with the first image.
        batch_size: images at a time.
        strip: rows of the strip; 0 for none.
        title: of grid and strip.
        on_step: called after each step of each batch; what it raises ends the drawing.

    Returns:
        The names of the images' files.
    """
    count, steps = len(labels), generator.steps
    names = [f"{seed + n:04d}.png" for n in range(count)]
    numbers = [f"seed {seed + n}" for n in range(count)]
    batches = list(ranges(count, batch_size))
    bar = progress(range(len(batches) * steps), "sampling steps", len(batches) * steps)
    next(bar)
    shown: list[Tensor] = []
    rows: list[list[Tensor]] = []
    columns: list[str] = []
    for start, stop in batches:
        trajectory = Trajectory(FRAMES if start < strip else 0)

        def note(step: Step, trajectory: Trajectory = trajectory) -> None:
            trajectory(step)
            next(bar, None)
            if on_step is not None:
                on_step()

        seeds = list(range(seed + start, seed + stop))
        rows_of = {name: values[start:stop] for name, values in inputs.items()}
        pictures = generator(rows_of, seeds, note)
        for name, picture in zip(names[start:stop], pictures, strict=True):
            with replacing(out / name, sync=False) as draft:
                as_picture(picture).save(draft)
        shown += beside_inputs(rows_of, pictures)[: max(0, GRID - start)]
        if start < strip:
            first = generator.start_label if IMAGE not in inputs else "start"
            columns = [first, *(f"step {number} of {steps}" for number in trajectory.numbers)]
            few = {name: values[: strip - start] for name, values in rows_of.items()}
            rows += intermediate(generator, few, seeds[: strip - start], trajectory, pictures)
    parts = 1 + (IMAGE in inputs) + (MASK in inputs)
    across = -(-(4 if len(shown) <= 16 else 8) // parts)
    legend = {1: "", 2: "input, result; ", 3: "input, mask, result; "}[parts]
    with replacing(out / "grid.png") as draft:
        sheet(shown, labels[:GRID], numbers[:GRID], across, f"{legend}{title}", max(generator.shape), parts).save(draft)
    if rows:
        first = [f"{number}\n{label}".strip() for number, label in zip(numbers, labels, strict=True)]
        texts = [text if n == 0 else "" for text, row in zip(first, rows, strict=False) for n in range(len(row))]
        title = f"{title}: {generator.strip_title}"
        flat = [picture for row in rows for picture in row]
        with replacing(out / "strip.png") as draft:
            sheet(flat, texts, columns * len(rows), len(columns), title, max(generator.shape)).save(draft)
    return names


def beside_inputs(inputs: dict[str, Tensor], pictures: Tensor) -> list[Tensor]:
    """Images, each on the right of the image that it started from and the mask, if there are some."""
    if IMAGE not in inputs:
        return list(pictures)
    masks = [255 * inputs[MASK].to(torch.uint8).expand(-1, 3, -1, -1)] if MASK in inputs else []
    return list(torch.cat([inputs[IMAGE], *masks, pictures], -1))


def intermediate(
    generator: PictureGenerator,
    inputs: dict[str, Tensor],
    seeds: list[int],
    trajectory: Trajectory,
    pictures: Tensor,
) -> list[list[Tensor]]:
    """The decoded states, from noise to image, of each of the first samples, those of `seeds`."""
    states = [generator.start(inputs, seeds), *(x[: len(seeds)] for x in trajectory.x[:-1])]
    columns = [*(generator.decode(state) for state in states), pictures[: len(seeds)]]
    return [list(row) for row in zip(*columns, strict=True)]


def sheet(
    pictures: list[Tensor], texts: list[str], labels: list[str], columns: int, title: str, size: int, parts: int = 1
) -> Image.Image:
    """A contact sheet that enlarges small images and shrinks large ones; a card has `parts` images side by side."""
    cell = min(256, max(128, size)) * parts
    return contact_sheet(pictures, texts, columns, labels=labels, title=title, cell=cell, max_lines=4)
