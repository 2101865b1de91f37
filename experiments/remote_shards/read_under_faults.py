"""Two ranks with three workers each read the same through faults as from disk: read_under_faults.py PHOTOS WEED GB.

PHOTOS is a folder of shards, WEED SeaweedFS's program, GB the cache's limit. The same batches are read from the test
suite's faulty server, and from moto and SeaweedFS behind a faulty proxy. Every sample's key, seed, stored bytes and
decoded pixels are compared with those from disk. The last line is one JSON object.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from read_rank import Reading
from servers import BUCKET, Running, server

from mmlab.data.remote.fetch_client import FetchClient

CACHE = Path("cache")
WORLD, WORKERS = 2, 3
BATCHES = 260  # of each rank: about four passes
RATE = 0.45
LONGEST = 1800  # seconds


def main(photos: Path, weed: str, gigabytes: float) -> int:
    expected, _, seconds = read("disk", str(photos.resolve()), gigabytes)
    print(f"from disk: {len(expected)} samples in {seconds:.0f} s", flush=True)
    every: Counter[str] = Counter()
    figures: dict[str, Any] = {}
    rate = ("--faults", RATE)
    for seed, kind in enumerate(("range", "moto", "seaweedfs")):
        with server(*({"seaweedfs": (kind, weed, "seaweedfs")}.get(kind, (kind,))), photos) as origin:
            if kind == "range":
                behind = server(kind, photos, *rate, "--seed", seed)
            else:
                behind = server("proxy", origin.address, *rate, "--seed", seed)
            with behind as faulty:
                address = faulty.address if kind == "range" else f"s3://{BUCKET}"
                figures[kind] = compare(kind, address, faulty, expected, gigabytes)
        every += faulty.faults
        figures[kind]["faults"] = faulty.faults.total()
        print(f"{kind}: {figures[kind]}", flush=True)
    totals = {key: sum(each[key] for each in figures.values()) for key in ("samples", "wrong", "replaced", "faults")}
    hangs = sum(each["hung"] for each in figures.values())
    print(json.dumps({**totals, "hangs": hangs, "by_kind": dict(sorted(every.items())), "servers": figures}))
    return 0 if not totals["wrong"] and not totals["replaced"] and not hangs else 1


def compare(kind: str, address: str, faulty: Running, expected: list[str], gigabytes: float) -> dict[str, Any]:
    """Read from a server and compare all samples with those from disk."""
    if address.startswith("s3:"):
        os.environ.update(faulty.environment())
    samples, ranks, seconds = read(kind, address, gigabytes)
    client = FetchClient(CACHE, int(gigabytes * 1e9), 600)
    numbers = client.stats()
    client.close()
    wrong = sum(a != b for a, b in zip(samples, expected, strict=False)) + abs(len(samples) - len(expected))
    return {
        "samples": len(samples),
        "wrong": wrong,
        "replaced": sum(rank["replaced"] for rank in ranks),
        "hung": WORLD - len(ranks),
        "longest_wait": max((rank["longest_wait"] for rank in ranks), default=None),
        "seconds": round(seconds, 1),
        **{name: numbers[name] for name in ("bytes", "hits", "misses", "evictions")},
    }


def read(name: str, path: str, gigabytes: float) -> tuple[list[str], list[dict[str, Any]], float]:
    """Read with all ranks; returns the lines of all samples, what each rank that ended says, and the seconds."""
    readings = [Reading(path, BATCHES, str(CACHE.resolve()), gigabytes, r, WORLD, WORKERS) for r in range(WORLD)]
    outputs = [Path(f"{name}-{reading.rank}.jsonl") for reading in readings]
    began = time.monotonic()
    script = str(Path(__file__).with_name("read_rank.py"))
    ranks = [
        subprocess.Popen([sys.executable, script, reading.as_json(), str(out)], stdout=subprocess.PIPE, text=True)
        for reading, out in zip(readings, outputs, strict=True)
    ]
    ended = []
    for rank in ranks:
        try:
            output, _ = rank.communicate(timeout=max(1.0, began + LONGEST - time.monotonic()))
            ended.append(json.loads(output.splitlines()[-1]))
        except subprocess.TimeoutExpired:
            rank.kill()
    return [line for out in outputs for line in out.read_text().splitlines()], ended, time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
