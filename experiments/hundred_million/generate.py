"""Write sets of shards whose indexes are complete and whose tars are holes: generate.py OUT SAMPLES SHARDS…

Each shard has SAMPLES samples; the shards of a smaller set are the first ones of the largest. Samples that the first
batches of a set read have real bytes in the tars; of all others, there are only the entries of the tables.
"""

import io
import json
import os
import sys
import time
import zlib
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from mmlab.data.formats import EXTENSIONS
from mmlab.data.manifest import table_name
from mmlab.data.order import EpochOrder, source_seed
from mmlab.data.shard_table import About, ScanNotes, ShardTable, content_hash, key_hash, write_table

SAMPLES, SETS = int(sys.argv[2]), tuple(map(int, sys.argv[3:]))
NAME, SEED, BLOCK_SHARDS, REAL = "laion", 0, 8, 256  # `measure.py` reads so many samples of a set
TYPES = ("complex", "conversation", "detail")


def main() -> None:
    out, start = Path(sys.argv[1]), time.perf_counter()
    for shards in SETS:
        (out / str(shards) / "index").mkdir(parents=True)
    real = samples_read()
    jobs = [(out, shard, real.get(shard, {})) for shard in range(max(SETS))]
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        sizes = list(pool.map(write_shard, *zip(*jobs, strict=True), chunksize=20))
    tables, tars = (sum(size) for size in zip(*sizes, strict=True))
    figures = {"table_bytes": tables, "tar_bytes": tars, "samples": max(SETS) * SAMPLES}
    print(json.dumps({"what": "generate", **figures, "seconds": time.perf_counter() - start}))


def samples_read() -> dict[int, dict[int, tuple[bytes, bytes]]]:
    """Shard → sample in it → picture and record, of the samples that are first in the order of each set."""
    real: dict[int, dict[int, tuple[bytes, bytes]]] = defaultdict(dict)
    for shards in SETS:
        order = EpochOrder([SAMPLES] * shards, source_seed(SEED, NAME), BLOCK_SHARDS)
        for position in range(REAL):
            shard, j = divmod(order.sample(0, position), SAMPLES)
            random = np.random.default_rng((shard, j))
            pixels = random.integers(0, 256, (64, 64, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            record = {"key": f"{shard:05d}{j:04d}", "caption": f"noise {j} of shard {shard}", "type": TYPES[j % 3]}
            real[shard][j] = file.getvalue(), json.dumps(record).encode()
    return real


def write_shard(out: Path, shard: int, real: dict[int, tuple[bytes, bytes]]) -> tuple[int, int]:
    """Write the table of a shard and its tar as a hole; returns the bytes of both."""
    random = np.random.default_rng(shard)
    lengths = np.empty((SAMPLES, 2), np.int64)
    lengths[:, 0] = random.lognormal(9.8, 0.5, SAMPLES).clip(2000, 200_000)
    lengths[:, 1] = random.integers(250, 600, SAMPLES)
    crcs = random.integers(0, 1 << 32, (SAMPLES, 2), np.uint32)
    for j, members in real.items():
        lengths[j] = [len(data) for data in members]
        crcs[j] = [zlib.crc32(data) for data in members]
    ends = np.cumsum(512 + -(-lengths.reshape(-1) // 512) * 512)
    offset = np.concatenate([[0], ends[:-1]]) + 512
    size = -(-(int(ends[-1]) + 1024) // 10_240) * 10_240
    keys = [f"{shard:05d}{j:04d}" for j in range(SAMPLES)]
    arrays = {
        "key_bytes": np.frombuffer("".join(keys).encode(), np.uint8),
        "key_ends": np.arange(1, SAMPLES + 1) * 9,
        "first": np.arange(SAMPLES + 1) * 2,
        "extension": np.tile([EXTENSIONS.index("jpg"), EXTENSIONS.index("json")], SAMPLES).astype(np.uint8),
        "offset": offset,
        "length": lengths.reshape(-1),
        "crc": crcs.reshape(-1),
    }
    table = ShardTable(
        about=About(size, None, (), TYPES, content_hash(arrays), ScanNotes()),
        key_hashes=np.array([key_hash(key) for key in keys], np.uint64),
        image_sizes=random.integers(200, 1200, (SAMPLES, 2), np.int32),
        further_sizes=np.zeros((0, 2), np.int32),
        text_lengths=random.integers(10, 200, SAMPLES, np.int32),
        type_codes=(np.arange(SAMPLES) % 3).astype(np.uint8),
        **arrays,
    )
    name = f"{shard:05d}.tar"
    folders = [out / str(shards) for shards in SETS if shard < shards]
    with (folders[-1] / name).open("wb") as file:
        for j, members in real.items():
            for member, data in enumerate(members):
                file.seek(offset[2 * j + member])
                file.write(data)
        file.truncate(size)
    for folder in folders[:-1]:
        os.link(folders[-1] / name, folder / name)
    path = folders[-1] / "index" / table_name(name)
    write_table(path, table)
    moment = time.time_ns() + 10**9
    os.utime(path, ns=(moment, moment))  # younger than the tar and its links, beyond the clock's steps
    for folder in folders[:-1]:
        os.link(path, folder / "index" / path.name)
    return path.stat().st_size, size


if __name__ == "__main__":
    main()
