"""How the cost of training grows: with the data set, the rows, pictures, ranks and the vocabulary.

Six panels, in `cost_growth.png` with the figures in `cost_growth.json`: time of a training step against the samples in
the index, the tokens of a packed row (dense mask and blocks), the pictures of a sample, and the ranks; peak memory
against tokens and vocabulary. Each point is measured in a process of its own (a fork), all points once a round; a line
joins the medians, and bars are the spread of the rounds. Times are CPU seconds of one thread, except those of ranks,
which wait for each other: elapsed seconds. Memory is what the process has resident at the peak of forward and backward
pass, more than before.

    python benchmarks/cost_growth.py [ROUNDS [FOLDER]]

Five rounds take about eight minutes on two idle cores, and need 1 GB for the index of 10 million samples, of which
there are only the entries.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cost_points
import torch
from all_contests import machine
from cost_plot import draw

from mmlab.data.indexing import build_index
from mmlab.data.shard_files import write_shards
from mmlab.data.sources.shapes import shapes
from mmlab.data.tokenizer import train_tokenizer

HERE = Path(__file__).parent
GENERATE = HERE.parent / "experiments" / "hundred_million" / "generate.py"
LENGTHS = (256, 512, 1024, 2048, 4096)
VOCABULARIES = (32_768, 65_536, 131_072, 262_144)
SAMPLES = (1000, 10_000, 100_000, 1_000_000, 10_000_000)


@dataclass(frozen=True)
class Panel:
    """Points to measure.

    Attributes:
        name: in the JSON file.
        measure: called with the folder, the way and x.
        ways: one line each.
        values: x of the points.
        rounds: how many measure them, at most: memory hardly varies.
    """

    name: str
    measure: Any
    ways: tuple[str, ...]
    values: tuple[int, ...]
    rounds: int = 99


PANELS = (
    Panel("dataset", cost_points.dataset_time, ("small LLaVA",), SAMPLES),
    Panel("sequence", cost_points.sequence_time, ("sdpa", "blocks"), LENGTHS),
    Panel("pictures", cost_points.pictures_time, ("small LLaVA",), (1, 2, 4, 8)),
    Panel("ranks", cost_points.ranks_time, ("DDP", "FSDP"), (1, 2)),
    Panel("sequence_memory", cost_points.sequence_memory, ("sdpa", "blocks"), (*LENGTHS, 8192), 3),
    Panel(
        "vocabulary_memory",
        cost_points.vocabulary_memory,
        ("logits, trained", "chunks, trained", "logits, frozen", "chunks, frozen"),
        VOCABULARIES,
        3,
    ),
)


def prepare(folder: Path, panels: tuple[Panel, ...]) -> None:
    """Write the tokenizer, and the sets of the points."""
    index, _ = write_shards(shapes(8, max_objects=2), folder / "shards", total=8, quiet=True)
    train_tokenizer([index], folder / "tokenizer", quiet=True)
    by_name = {panel.name: panel.values for panel in panels}
    for pictures in by_name.get("pictures", ()):
        count = cost_points.BATCH * (cost_points.STEPS + 1)
        samples = cost_points.picture_samples(count, pictures)
        write_shards(samples, folder / "pictures" / str(pictures), total=count, quiet=True)
    sets = folder / "sets"
    sets.mkdir()
    for per_shard in (1000, 10_000):
        sizes = [n for n in by_name.get("dataset", ()) if (n == 1000) == (per_shard == 1000)]
        if not sizes:
            continue
        out, shards = folder / f"of-{per_shard}", [str(n // per_shard) for n in sizes]
        subprocess.run([sys.executable, str(GENERATE), str(out), str(per_shard), *shards], check=True, stdout=2)
        for samples, name in zip(sizes, shards, strict=True):
            (out / name).rename(sets / str(samples))
            build_index(sets / str(samples), quiet=True)


def in_a_fork(panel: Panel, folder: Path, way: str, value: int) -> dict[str, float]:
    """Measure a point in a fork, which has all imports done.

    Raises:
        RuntimeError: it failed; its traceback was printed.
    """
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise RuntimeError(f"{panel.name} of {value}, {way}, failed")
        return json.loads(text)
    code = 1
    try:
        reading = panel.measure(folder, way, value)
        with os.fdopen(writer, "w") as pipe:
            pipe.write(json.dumps(reading))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def measure(folder: Path, panels: tuple[Panel, ...], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Panel → its points, with the readings of all rounds."""
    points: dict[str, list[dict[str, Any]]] = {
        panel.name: [{"way": way, "x": x, "readings": []} for way in panel.ways for x in panel.values]
        for panel in panels
    }
    for n in range(rounds):
        for panel in panels:
            for point in points[panel.name] if n < panel.rounds else ():
                point["readings"].append(in_a_fork(panel, folder, point["way"], point["x"]))
                print(f"round {n + 1}: {panel.name} {point['way']} {point['x']}: {point['readings'][-1]}", flush=True)
    for of_panel in points.values():
        for point in of_panel:
            for name in point["readings"][0]:
                values = sorted(reading[name] for reading in point["readings"])
                point[name] = {"median": statistics.median(values), "least": values[0], "most": values[-1]}
            del point["readings"]
    return points


def main(rounds: int, target: Path) -> None:
    torch.set_num_threads(1)
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp())
    try:
        prepare(folder, PANELS)
        points = measure(folder, PANELS, rounds)
    finally:
        shutil.rmtree(folder)
    about = {"machine": machine(), "torch": torch.__version__, "rounds": rounds, "load": os.getloadavg()[0]}
    results = {**about, "minutes": round((time.monotonic() - started) / 60, 1), "panels": points}
    (target / "cost_growth.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(points, target / "cost_growth.png")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(int(arguments[0]) if arguments else 5, Path(arguments[1]) if len(arguments) > 1 else HERE)
