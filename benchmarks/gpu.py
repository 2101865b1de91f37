"""See gpu.sh: gpu.py [tiny] OUT."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gpu_conversations
import gpu_diffusion
import torch
from gpu_llava import llava
from gpu_ways import PEAK, Case, free, measure, product_peak, reason_of

from mmlab.model import compiled_layers
from mmlab.training.gpus import gpu_named

LIMIT = 440
"""Seconds after the imports when it ends, whatever it is doing."""
STARTED = time.monotonic()


def cases(tiny: bool, device: torch.device) -> dict[str, tuple[float, int, Callable[[], Case]]]:
    """Name → (share of the time, rounds, builds it), in the order in which they run."""
    captions = gpu_conversations.TINY if tiny else gpu_conversations.Size()
    # Full finetuning of 7B in bf16 leaves room for about 10,000 padded tokens on 141 GB.
    answers, questions = (captions, captions) if tiny else (replace(captions, rows=2), replace(captions, rows=1))
    dit = gpu_diffusion.TINY_DIT if tiny else gpu_diffusion.Size()
    unet = gpu_diffusion.TINY_UNET if tiny else gpu_diffusion.Size(batch=42)
    align, finetune = "llava/v15_7b_align", "llava/v15_7b_finetune"
    seven = "LLaVA-1.5 7B"
    return {
        f"{seven}, stage 1": (3, captions.rounds, lambda: llava("caption", align, captions, device)),
        f"{seven}, stage 2": (4, answers.rounds, lambda: llava("conversation", finetune, answers, device)),
        "DiT-XL/2": (1.5, dit.rounds, lambda: gpu_diffusion.dit(dit, device)),
        "UNet f4": (3.5, unet.rounds, lambda: gpu_diffusion.unet(unet, device)),
        f"{seven}, questions": (2, questions.rounds, lambda: llava("questions", finetune, questions, device)),
    }


class Results:
    """What was measured so far, in a file of one line.

    Args:
        out: the folder.
        about: of the machine and the run.
    """

    def __init__(self, out: Path, about: dict[str, Any]):
        self.path, self.values = out / "gpu.json", {**about, "cases": {}}
        self.lock = threading.Lock()
        self.write()

    def note(self, case: str, figures: dict[str, Any]) -> None:
        with self.lock:
            self.values["cases"].setdefault(case, {}).update(figures)
            self.write()

    def write(self) -> None:
        self.values["seconds"] = time.monotonic() - STARTED
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(rounded(self.values)) + "\n")
        draft.replace(self.path)

    def end(self, reason: str) -> None:
        """End the process, whatever it is doing."""
        with self.lock:
            self.values["ended_early"] = reason
            self.write()
        print(f"{reason}: what remains was not measured", flush=True)
        os._exit(0)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def about(device: torch.device, tiny: bool) -> tuple[dict[str, Any], dict[str, float]]:
    """The machine, and its peaks in FLOP/s by name."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    products = product_peak(device)
    peaks = {"measured": next((peak for word, peak in PEAK.items() if word in name), products)}
    if (gpu := gpu_named(name)) is not None:
        peaks["datasheet"] = gpu.tflops * 1e12
    packages = ("torch", "transformers", "diffusers")
    return {
        "device": name,
        "tiny": tiny,
        "versions": {package: version(package) for package in packages},
        "matrix_product_tflop_per_s": products / 1e12,
        "peak_tflop_per_s": {kind: peak / 1e12 for kind, peak in peaks.items()},
    }, peaks


def show(name: str, case: Case, rows: list[dict[str, Any]]) -> None:
    heads = f"{'ms':>9}{'least':>9}{case.unit + '/s':>11}{'ratio':>7}{'TFLOP/s':>9}"
    print(f"\n{name}\n{'':<46}{heads}{'MFU':>6}{'sheet':>7}{'GiB':>7}{'1st s':>7}")
    for row in rows:
        if "ms" not in row:
            print(f"{row['way']:<46}  {row.get('skipped', 'not measured')}")
            continue
        sheet, memory = row.get("mfu_datasheet"), row.get("memory_gib")
        print(
            f"{row['way']:<46}{row['ms']:>9.1f}{row['ms_min']:>9.1f}{row['per_s']:>11.1f}{row['ratio']:>6.2f}x"
            f"{row['tflop_per_s']:>9.3g}{row['mfu_measured']:>6.0%}{'' if sheet is None else f'{sheet:.0%}':>7}"
            f"{'' if memory is None else f'{memory:.1f}':>7}{row['first_step_s']:>7.1f}  loss {row['losses'][0]:.5f}",
            flush=True,
        )


def main(tiny: bool, out: Path, only: str = "") -> None:
    device = torch.device("cpu" if tiny else "cuda")
    if tiny:
        compiled_layers.BACKEND = "eager"  # traces layers; compiling kernels for them would take minutes
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # instead of running it uncompiled
    facts, peaks = about(device, tiny)
    results = Results(out, facts)
    watch = threading.Timer(LIMIT - (time.monotonic() - STARTED), lambda: results.end(f"{LIMIT} s are over"))
    watch.daemon = True
    watch.start()
    chosen = {name: value for name, value in cases(tiny, device).items() if only in name}
    left = sum(share for share, _, _ in chosen.values())
    for name, (share, rounds, build) in chosen.items():
        remaining = LIMIT - 15 - (time.monotonic() - STARTED)
        until = time.monotonic() + remaining * share / left
        left -= share
        try:
            case = build()
            noted: list[Any] = []

            def note(rows: list[dict[str, Any]], name: str = name, unit: str = case.unit, noted: Any = noted) -> None:
                noted[:] = rows
                results.note(name, {"unit": unit, "ways": [dict(row) for row in rows]})

            measure(case, until, rounds, peaks, note)
            show(name, case, noted)
            del case
        except Exception as error:  # the other cases are measured all the same
            results.note(name, {"skipped": reason_of(error)})
            print(f"\n{name}\n  {reason_of(error)}", flush=True)
        torch._dynamo.reset()
        free()
    watch.cancel()
    results.write()


if __name__ == "__main__":
    main(sys.argv[1:2] == ["tiny"], Path(sys.argv[-1]), os.environ.get("ONLY", ""))
