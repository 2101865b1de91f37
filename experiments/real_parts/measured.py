"""Run a command, and add a line with its minutes and peak memory to steps.jsonl: measured.py NAME COMMAND…"""

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
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of KiB; of the largest process
    line = {"step": name, "minutes": round((time.monotonic() - start) / 60, 2), "peak_memory_gib": round(peak, 2)}
    with Path("steps.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
