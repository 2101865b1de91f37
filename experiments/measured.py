"""Run a command, and add a line with its minutes, those of CPU cores, and its peak memory to steps.jsonl.

measured.py NAME COMMAND…
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    name, *command = sys.argv[1:]
    start = time.monotonic()
    code = subprocess.run(command).returncode
    minutes = (time.monotonic() - start) / 60
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cores, peak = (used.ru_utime + used.ru_stime) / 60, used.ru_maxrss / 2**20  # of KiB; of the largest process
    figures = {"minutes": minutes, "cpu_minutes": cores, "peak_memory_gib": peak}
    line = {"step": name, **{name: round(value, 2) for name, value in figures.items()}}
    with Path("steps.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
