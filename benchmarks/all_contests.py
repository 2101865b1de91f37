"""All contests: one table each, and `benchmarks/results.json` with the machine and the versions.

python benchmarks/all_contests.py [ROUNDS]
python benchmarks/all_contests.py --table     # the last results, as in docs/speed.md
"""

import importlib
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from contest import measure

from mmlab.training.cpu_products import use_products

HERE = Path(__file__).parent
CONTESTS = (
    *("llava_stage1", "llava_questions", "ldm_training", "ldm_churches", "vqgan_training"),
    *("shard_reading", "pictures", "large_pictures", "start_up"),
)
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
        "products_gflops": {kind: round(product_rate(kind)) for kind in ("torch", "onednn")},
    }


def product_rate(kind: str) -> float:
    """GFLOP/s of fp32 matrix products as in the LLaVA contests, with all threads: the limit of their training steps."""
    rows, width, hidden = 608, 576, 1536
    x, weight = torch.randn(rows, width), torch.randn(width, hidden)
    use_products(kind)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        torch.mm(x, weight)
        times.append(time.perf_counter() - start)
    use_products("torch")
    return 2 * rows * width * hidden / min(times) / 1e9


def table(results: dict[str, Any]) -> str:
    """The results as a table in Markdown: a row for each side but the baselines."""
    lines = [
        "| contest | beside | rate | ratio | goal | whole run | CPU time | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results["contests"].values():
        first = one["sides"][one["baseline"]]
        for name, side in one["sides"].items():
            if name == one["baseline"]:
                continue
            cells = [
                f"{one['title']}: {name}",
                one["baseline"],
                f"{_short(side['rate'])} and {_short(first['rate'])} {one['unit']}/s",
                f"{side['ratio']:.2f} ×",
                f"{side['goal']:g} ×" if "goal" in side else "",
                f"{side['whole_run_s']:.1f} and {first['whole_run_s']:.1f} s, {side['whole_run_ratio']:.2f} ×",
                f"{side['cpu_ratio']:.2f} × less",
                f"{side['peak_gb']:.1f} and {first['peak_gb']:.1f} GB",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    machine, versions = results["machine"], results["versions"]
    products = ", ".join(f"{rate} GFLOP/s by {kind}" for kind, rate in machine["products_gflops"].items())
    about = f"{machine['processor']}, {machine['threads']} threads; fp32 products {products}"
    return "\n".join([*lines, "", f"{about}; {', '.join(f'{name} {number}' for name, number in versions.items())}."])


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def main() -> None:
    if sys.argv[1:] == ["--table"]:
        if not (HERE / "results.json").exists():
            sys.exit("There are no results yet: python benchmarks/all_contests.py measures them.")
        print(table(json.loads((HERE / "results.json").read_text())))
        return
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    results = {"machine": machine(), "versions": {name: version(name) for name in PACKAGES}, "contests": {}}
    for name in CONTESTS:
        contest = importlib.import_module(name).CONTEST
        results["contests"][name] = measure(contest, str(HERE / f"{name}.py"), rounds)
        (HERE / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
