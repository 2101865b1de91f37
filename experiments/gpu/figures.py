"""Print the figures of one run of run.sh as one JSON object: figures.py MODEL SECONDS, in its folder."""

import json
import sys
from pathlib import Path
from typing import Any

import torch


def rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


results: dict[str, Any] = {"model": sys.argv[1], "torch": torch.__version__}
for precision in ("bf16-mixed", "bf16-true"):
    files = [Path(f"{precision}.json"), Path(f"{precision}.plan.json")]
    figures = {name: rounded(value) for file in files for name, value in json.loads(file.read_text()).items()}
    if figures["device"] != "CPU":  # where it is the memory of the whole process
        figures["memory_over_plan"] = rounded(figures["memory_gib"] / figures["plan_gib"])
    results[precision] = figures
print(json.dumps({**results, "minutes": round(int(sys.argv[2]) / 60, 2)}))
