"""Write the index of the earlier version for sets whose tables exist: join_before.py SET LARGER.

The first set takes that version's own way, which holds all keys in a dict; for the larger one, the arrays are joined
here, because that dict would take more memory than the machine has. Runs with the earlier version.
"""

import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mmlab.data.index_arrays import write_arrays
from safetensors.numpy import load_file

from mmlab.data.index import Members, ShardIndex, _arrays, _merge
from mmlab.data.scan import ScanNotes, ShardScan, list_shards

TYPES = ("complex", "conversation", "detail")


def main() -> None:
    for folder, way in zip(map(Path, sys.argv[1:]), (merge, concatenate), strict=True):
        start, cpu = time.perf_counter(), time.process_time()
        index, seconds, reading = way(folder)
        write_arrays(folder, _arrays(index), False)
        figures = {
            "what": "join",
            "code": "before",
            "shards": len(index.shards),
            "samples": len(index),
            "seconds": time.perf_counter() - start - seconds,
            "cpu": time.process_time() - cpu - reading,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "own_way": way is merge,
            "index_bytes": (folder / "index.npz").stat().st_size,
        }
        print(json.dumps(figures), flush=True)
        del index


def merge(folder: Path) -> tuple[ShardIndex, float, float]:
    """The index, and the seconds and CPU seconds that reading the tables took."""
    spent, cpu, shards = 0.0, 0.0, list_shards(folder)

    def scans() -> Iterator[ShardScan]:
        nonlocal spent, cpu
        for path in shards:
            start, first = time.perf_counter(), time.process_time()
            table = tables_of(folder, path)
            text = table["key_bytes"].tobytes().decode()
            scan = ShardScan(
                size=path.stat().st_size,
                keys=[text[j : j + 9] for j in range(0, len(text), 9)],
                types=[TYPES[code] for code in table["type_codes"].tolist()],
                skipped=Counter(),
                bad_records={},
                question_types=Counter(),
                **{name: table[name] for name in ("first", "extension", "offset", "length", "crc")},
                **{name: table[name] for name in ("image_sizes", "further_sizes", "text_lengths")},
            )
            spent, cpu = spent + time.perf_counter() - start, cpu + time.process_time() - first
            yield scan

    return _merge(folder, shards, scans()), spent, cpu


def concatenate(folder: Path) -> tuple[ShardIndex, float, float]:
    """The same index, but for its hash, which is not read again."""
    shards = list_shards(folder)
    tables = [tables_of(folder, path) for path in shards]
    counts = np.array([len(table["key_ends"]) for table in tables])

    def joined(name: str) -> np.ndarray:
        return np.concatenate([table.pop(name) for table in tables])

    members = {name: joined(name) for name in ("extension", "offset", "length", "crc")}
    index = ShardIndex(
        root=folder,
        shards=tuple(path.name for path in shards),
        shard_sizes=np.array([path.stat().st_size for path in shards]),
        samples_per_shard=counts,
        keys=joined("key_bytes").view("S9"),
        image_sizes=joined("image_sizes"),
        further_sizes=np.zeros((0, 2), np.int32),
        text_lengths=joined("text_lengths"),
        type_codes=joined("type_codes"),
        type_names=TYPES,
        members=Members(first=np.arange(counts.sum() + 1) * 2, **members),
        hash="0" * 64,
        notes=ScanNotes(),
    )
    tables.clear()
    object.__setattr__(index, "keys", np.char.decode(index.keys, "ascii"))
    return index, 0.0, 0.0


def tables_of(folder: Path, shard: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "index" / f"{shard.stem}.safetensors")


if __name__ == "__main__":
    main()
