"""Measure one thing about a set in a fresh process, with the code that PYTHONPATH names: measure.py WHAT SET.

open, random, training, order, types: the index alone. batch: the first batches. fork, spawn: a loader's workers.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
WORKERS, BATCH, BATCHES, STEP = 3, 32, 8, 25
NAME, SEED, BLOCK_SHARDS = "laion", 0, 8


def memory(process: int | str | None = "self") -> dict[str, int]:
    """Bytes of a process: all, those of its own, and its share of all."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {fields[0].rstrip(":"): int(fields[1]) * 1024 for fields in map(str.split, lines)}
    return {"resident": sizes["Rss"], "private": sizes["Anonymous"], "share": sizes["Pss"]}


def seek(index: Any, i: int) -> tuple[str, list[str], str]:
    """What the reader asks of an index before it reads bytes."""
    return str(index.keys[i]), index.extensions(i), index.type_of(i)


def seeks(index: Any, numbers: list[int]) -> dict[str, Any]:
    start, cpu = time.perf_counter(), time.process_time()
    for i in numbers:
        seek(index, i)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seeks": len(numbers), "seconds": seconds, "cpu": cpu}


class Walk:
    """A dataset: the first batches of samples, then seeks through ten blocks of shards."""

    def __init__(self, batches: Any, index: Any):
        self.batches = batches
        self.index = index

    def __getitem__(self, m: int) -> int:
        if m < BATCHES:
            return len(self.batches[m]["keys"])
        start = (m - BATCHES) * BATCH * STEP
        for position in range(start, start + BATCH * STEP, STEP):
            seek(self.index, self.batches.orders[0].sample(0, position))
        return BATCH


class Pictures:
    """A collate: pictures and captions."""

    members: tuple[str, ...] = ()

    def __init__(self) -> None:
        from mmlab.data.sample_types import ImageSpec

        self.image: Any = ImageSpec(224, "crop")

    def prepare(self, sample: Any) -> Any:
        from mmlab.data.sample_types import Prepared

        return Prepared((sample.image, sample.record["caption"]), {})

    def batch(self, contents: list[Any]) -> dict[str, Any]:
        import torch

        pictures, captions = zip(*contents, strict=True)
        return {"pixel_values": torch.stack(pictures), "captions": captions}


def open_index(folder: str) -> tuple[Any, dict[str, Any]]:
    from mmlab.data.index import ShardIndex

    before, start, cpu = memory(), time.perf_counter(), time.process_time()
    index = ShardIndex.open(folder)
    opened = {"open_seconds": time.perf_counter() - start, "open_cpu": time.process_time() - cpu}
    return index, {**opened, "imported": before, "opened": memory()}


def order_of(index: Any) -> Any:
    from mmlab.data.order import EpochOrder, source_seed

    return EpochOrder(index.samples_per_shard, source_seed(SEED, NAME), BLOCK_SHARDS)


def measure(what: str, folder: str) -> dict[str, Any]:
    index, opened = open_index(folder)
    opened["samples"] = len(index)
    if what == "open":
        return opened
    if what == "random":
        import numpy as np

        numbers = np.random.default_rng(0).integers(0, len(index), 10_000).tolist()
        return {**opened, **seeks(index, numbers), "after": memory()}
    if what == "training":
        order = order_of(index)
        block = BLOCK_SHARDS * int(index.samples_per_shard[0])
        first = seeks(index, [order.sample(0, position) for position in range(0, block, 2)])
        seeks(index, [order.sample(0, position) for position in range(block, 10 * block, STEP)])
        return {**opened, **first, "after": memory()}
    if what == "order":
        order, start, cpu = order_of(index), time.perf_counter(), time.process_time()
        order.sample(1000, len(index) // 2)
        return {**opened, "seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    if what == "types":
        from mmlab.data.mixture import Source, by_type

        start, cpu = time.perf_counter(), time.process_time()
        parts = by_type([Source(NAME, index)])
        split = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        start = time.process_time()
        for i in range(20_000):
            parts[i % len(parts)].number(i)
        return {**opened, **split, "numbers": 20_000, "number_cpu": time.process_time() - start, "after": memory()}
    return loader(what, folder, index, opened)


def loader(what: str, folder: str, index: Any, opened: dict[str, Any]) -> dict[str, Any]:
    start = time.monotonic()
    from mmlab.data.batch_loader import LocalLoader
    from mmlab.data.config import ShardsConfig
    from mmlab.data.mixture import Source
    from mmlab.data.reader import GlobalBatches, LocalBatches

    imported, imports = memory(), time.monotonic() - start
    config = ShardsConfig(global_batch=BATCH, micro_batch=BATCH, seed=SEED, block_shards=BLOCK_SHARDS)
    batches = LocalBatches([Source(NAME, index)], Pictures(), GlobalBatches(BATCH, BATCH), config)
    if what == "batch":
        start = time.monotonic()
        assert not batches[0]["bad"]
        now = time.monotonic()
        figures = {"first_batch": now - start, "imports": imports, "all": now - float(sys.argv[3])}
        return {**opened, **figures, "all_cpu": time.process_time()}
    walk = LocalLoader(
        Walk(batches, index), BATCHES + 10 * 10_000 * BLOCK_SHARDS // (BATCH * STEP), lambda: 0, WORKERS, context=what
    )
    assert sum(walk) == BATCH * len(walk)
    workers = [memory(process.pid) for process in walk._workers]
    figures = {**opened, "imported": imported, "main": memory(), "workers": workers}
    walk.close()
    return figures


if __name__ == "__main__":
    what, folder = sys.argv[1:3]
    if what == "batch" and len(sys.argv) < 4:  # the time of a start includes python's
        command = [sys.executable, __file__, what, folder, str(time.monotonic())]
        sys.exit(subprocess.run(command).returncode)
    import mmlab

    code = "before" if Path(mmlab.__path__[0]).parent.name == "before" else "after"
    shards = int(Path(folder).name)
    print(json.dumps({"what": what, "code": code, "shards": shards, **measure(what, folder)}))
