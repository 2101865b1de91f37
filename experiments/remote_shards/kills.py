"""Training from a slow, faulty server is killed during fetches and evictions: kills.py PHOTOS KILLS GB.

The run has two ranks with three workers each and reads PHOTOS, a folder of shards, through the folder `cache`, which
has room for GB. It is killed with SIGKILL, all ranks and workers at once: alone, or together with the fetcher, as when
a machine fails. In a third of the starts the fetcher alone is killed before that, and the run must train on. Half of
the kills come while an object is being fetched, half right after one was evicted. At the end the run must be bitwise
equal to one that was never killed and read the same shards from disk. The last line is one JSON object.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from servers import server

from experiments.kill_matrix.kill_matrix import LENGTH, Start, same_batches, values
from mmlab.training.checkpoint_folder import steps
from mmlab.training.checkpoint_io import read
from mmlab.training.resume_proof import difference, read_batches, results

CACHE, RUN, STRAIGHT = Path("cache"), Path("killed"), Path("straight")
SLOW = ("--faults", 0.1, "--rate", 600_000, "--latency", 0.02)
"""Of the proxy: a shard takes longer than a second."""
KIND = ("ddp", 2)
RECIPE = [
    "experiment=diffusion/ddpm_tiny",
    "data.val=[]",
    "data.root=''",
    "data.global_batch=32",
    "data.micro_batch=16",
    "data.workers=3",
    "data.block_shards=3",
    "trainer.val_every=null",
    "callbacks.samples=null",
]
COUNTED = ("kills", "with_fetcher", "fetcher_alone", "in_a_fetch", "parts_left", "after_an_eviction", "no_progress")
WHO = ("the run", "the run and the fetcher")
PATIENCE = 180.0
_LOOK = 0.001


def main(photos: Path, kills: int, gigabytes: float) -> int:
    random.seed(0)
    for folder in (RUN, STRAIGHT):
        shutil.rmtree(folder, ignore_errors=True)
    figures: dict[str, Any] = dict.fromkeys(COUNTED, 0)
    began = time.monotonic()
    with server("range", photos) as origin, server("proxy", origin.address, *SLOW) as slow:
        recipe = [*RECIPE, f"data.train=[{{path:'{slow.address}',name:photos}}]"]
        recipe += [f"data.cache.folder={CACHE.resolve()}", f"data.cache.gigabytes={gigabytes}"]
        for number in range(kills):
            print(f"kill {number + 1}/{kills}: {kill(number, recipe, figures)}", flush=True)
        length = saved() + 2
        Start(RUN, kills, length, KIND, recipe, Path.cwd()).finish()
    recipe = [*RECIPE, f"data.train=[{{path:'{photos.resolve()}',name:photos}}]"]
    Start(STRAIGHT, 0, length, KIND, recipe, Path.cwd()).finish()
    a, b = values(RUN), values(STRAIGHT)
    last, other = (read(folder / "checkpoints" / f"step-{length}") for folder in (RUN, STRAIGHT))
    figures |= {
        "faults": slow.faults.total(),
        "steps": length,
        "same_batches": same_batches(RUN, read_batches(STRAIGHT / "starts" / "0")[0]),
        "values": len(b),
        "values_differing": sum(a.get(place) != b.get(place) for place in a.keys() | b.keys()),
        "difference": difference(last, other) or difference(results(RUN), results(STRAIGHT)),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    print(json.dumps(figures))
    return 0 if figures["same_batches"] and figures["difference"] is None else 1


def kill(number: int, recipe: list[str], figures: dict[str, Any]) -> str:
    """Start the run and kill it; returns a description."""
    before = saved()
    start, told = Start(RUN, number, LENGTH, KIND, recipe, Path.cwd()), ""
    if number % 3 == 2:
        wait_for_step(start, before)
        wait_for(start, "fetch")
        os.kill(fetcher(), signal.SIGKILL)
        figures["fetcher_alone"] += 1
        wait_for_step(start, saved())
        told = "the fetcher, and later "
    elif number % 5:  # else also during startup
        wait_for_step(start, before)
    moment, who = ("fetch", "eviction")[number % 2], WHO[number // 2 % 2]
    moment = wait_for(start, moment)
    if who == WHO[1]:
        with suppress(ProcessLookupError, FileNotFoundError, ValueError):
            os.kill(fetcher(), signal.SIGKILL)
        figures["with_fetcher"] += 1
    start.kill("all")
    parts = sum(name.endswith(".part") for name in files())
    start.wait()
    after = saved()
    figures["kills"] += 1
    figures["in_a_fetch"] += parts > 0
    figures["parts_left"] += parts if who == WHO[1] else 0
    figures["after_an_eviction"] += moment == "eviction"
    figures["no_progress"] += after == before
    return f"{told}{who}, {moment}; {parts} downloads were under way; step {after} is saved"


def saved() -> int:
    """The last step of the run that was saved."""
    return max(steps(RUN / "checkpoints"), default=0)


def wait_for_step(start: Start, before: int) -> None:
    """Wait until a later step is saved."""
    end = time.monotonic() + PATIENCE
    while saved() <= before:
        start.check()
        if time.monotonic() > end:
            start.kill("all")
            raise AssertionError(f"no step was trained in {PATIENCE:g} s after step {before}")
        time.sleep(0.01)


def wait_for(start: Start, moment: str) -> str:
    """Wait until a fetch is under way, a random time more, or until a copy is evicted; returns what came."""
    end, known = time.monotonic() + PATIENCE, files()
    while time.monotonic() < end:
        start.check()
        now = files()
        if moment == "fetch" and is_fetching(now):
            time.sleep(random.uniform(0, 0.3))
            if is_fetching(files()):
                return moment
        if moment == "eviction" and any(not name.endswith(".part") for name in known - now):
            return moment
        known = now
        time.sleep(_LOOK)
    start.kill("all")
    raise AssertionError(f"no {moment} in {PATIENCE:g} s")


def files() -> set[str]:
    """The files in the cache, unfinished ones too."""
    return {str(path) for path in CACHE.glob("*/**/*") if path.suffix}


def is_fetching(names: set[str]) -> bool:
    return any(name.endswith(".part") for name in names)


def fetcher() -> int:
    """The process that fetches."""
    return int((CACHE / "lock").read_text().split()[1])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
