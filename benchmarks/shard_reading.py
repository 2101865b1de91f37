"""Samples per second from the same shards: webdataset streaming against our index; interleaved rounds, medians.

python benchmarks/shard_reading.py [samples]
"""

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import webdataset

from mmlab.data.index import ShardIndex
from mmlab.data.shard_files import write_shards
from mmlab.data.sources.shapes import shapes

ROUNDS = 7


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    with tempfile.TemporaryDirectory() as folder:
        write_shards(shapes(count), Path(folder) / "shards", total=count, quiet=True)
        index = ShardIndex.open(Path(folder) / "shards")
        urls = [str(index.root / name) for name in index.shards]
        order = list(range(count))
        random.Random(0).shuffle(order)

        def stream() -> int:
            return sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False))

        def indexed() -> int:
            return sum(1 for i in order if index.read(i))

        seconds: dict[str, list[float]] = {"webdataset, in order": [], "index, shuffled, CRC checked": []}
        for _ in range(ROUNDS):
            for name, read in zip(seconds, (stream, indexed), strict=True):
                start = time.perf_counter()
                assert read() == count
                seconds[name].append(time.perf_counter() - start)
        for name, times in seconds.items():
            print(f"{name:<30} {count / statistics.median(times):>10,.0f} samples/s (best {count / min(times):,.0f})")


if __name__ == "__main__":
    main()
