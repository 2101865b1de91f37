"""Index real shards in one process, with the code that PYTHONPATH names: build.py SET; samples per second."""

import json
import shutil
import sys
import time
from pathlib import Path

import mmlab

code = "before" if Path(mmlab.__path__[0]).parent.name == "before" else "after"
if code == "before":
    from mmlab.data.index import build_index
else:
    from mmlab.data.indexing import build_index

folder = Path(sys.argv[1])
shutil.rmtree(folder / "index", ignore_errors=True)
(folder / "index.npz").unlink(missing_ok=True)
start, cpu = time.perf_counter(), time.process_time()
index = build_index(folder, quiet=True)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"what": "build", "code": code, "samples": len(index), "seconds": seconds, "cpu": cpu}))
