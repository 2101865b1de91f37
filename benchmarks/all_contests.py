"""All contests: one table each, and `benchmarks/results.json` with the machine and the versions.

python benchmarks/all_contests.py [ROUNDS]
"""

import importlib
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from contest import measure

HERE = Path(__file__).parent
CONTESTS = ("shard_reading",)
PACKAGES = ("torch", "lightning", "transformers", "diffusers", "accelerate", "webdataset", "numpy", "simplejpeg")


def machine() -> dict[str, Any]:
    """Processor, cores and the kinds of matrix units that it has."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split("\t: ", 1) for line in info.replace("\t\t: ", "\t: ").splitlines() if "\t: " in line)
    flags = lines.get("flags", "").split()
    return {
        "processor": lines.get("model name", platform.processor()),
        "threads": torch.get_num_threads(),
        "bf16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "python": platform.python_version(),
    }


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    results = {"machine": machine(), "versions": {name: version(name) for name in PACKAGES}, "contests": {}}
    for name in CONTESTS:
        contest = importlib.import_module(name).CONTEST
        results["contests"][name] = measure(contest, str(HERE / f"{name}.py"), rounds)
        (HERE / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
