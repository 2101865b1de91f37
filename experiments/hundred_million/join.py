"""Join the tables of a set, whose shards are indexed, into its manifest: join.py SET; time and highest memory."""

import json
import resource
import sys
import time
from pathlib import Path

from mmlab.data.indexing import build_index

folder = Path(sys.argv[1])
start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
index = build_index(folder, quiet=True)
print(
    json.dumps(
        {
            "what": "join",
            "code": "after",
            "shards": len(index.shards),
            "samples": len(index),
            "seconds": time.perf_counter() - start,
            "cpu": time.process_time(),
            "imported": before,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "manifest_bytes": (folder / "index" / "manifest.json").stat().st_size,
        }
    )
)
