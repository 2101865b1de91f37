"""Contest: small samples from the same shards, by webdataset's stream in order and by our index, shuffled.

Ours compares each member's CRC. Neither decodes anything; each uses one process.

    python benchmarks/shard_reading.py [ROUNDS]
"""

import random
import time
from pathlib import Path

import webdataset
from contest import Contest, Outcome, main, tiny

from mmlab.data.index import ShardIndex
from mmlab.data.shard_files import write_shards
from mmlab.data.sources.shapes import shapes

SAMPLES, PASSES = (40, 1) if tiny() else (4000, 4)


def prepare(folder: Path) -> None:
    write_shards(shapes(SAMPLES), folder / "shards", total=SAMPLES, quiet=True)


def stream(folder: Path) -> Outcome:
    urls = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]
    start = time.perf_counter()
    count = sum(1 for _ in range(PASSES) for _ in webdataset.WebDataset(urls, shardshuffle=False))
    return Outcome(count, time.perf_counter() - start)


def indexed(folder: Path) -> Outcome:
    index = ShardIndex.open(folder / "shards")
    order = list(range(SAMPLES))
    random.Random(0).shuffle(order)
    start = time.perf_counter()
    count = sum(1 for _ in range(PASSES) for i in order if index.read(i))
    return Outcome(count, time.perf_counter() - start)


CONTEST = Contest(
    "reading",
    "samples",
    {"webdataset, in order": stream, "mmlab, shuffled": indexed},
    prepare,
    goals={"mmlab, shuffled": 6},
)

if __name__ == "__main__":
    main(CONTEST)
