"""The peak that `mmlab plan` predicts against the one of real training steps on the CPU.

Each case takes two optimizer steps on the largest batch that its config allows, with Lightning's trainer as a run has
it, in processes of their own. Measured is the highest resident memory of the second one's passes and of its update
(VmHWM, reset before each) without that of the imports, of rank 0; malloc is told to return what is freed. Models have
1.1 to 1.5 GiB of weights.

    python benchmarks/plan_memory.py                  # all cases: ten minutes on two idle cores, 7 GiB
    python benchmarks/plan_memory.py llava-fsdp       # cases whose names contain a word
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from mmlab.config.build import build
from mmlab.config.compose import compose
from mmlab.data.shard_files import write_shards
from mmlab.data.sources.shapes import shapes
from mmlab.data.tokenizer import train_tokenizer
from mmlab.runs.ranks import rank
from mmlab.stage.assembly import build_around, put_on_adapters
from mmlab.stage.estimate import estimate
from mmlab.stage.largest_batch import largest_batch
from mmlab.training.trainer import build_trainer

GIB = 2**30
LAYERS = "num_hidden_layers: 12, num_attention_heads: 8, hidden_size: 1024, intermediate_size: 4096"
LLAVA = [
    "experiment=llava/finetune_tiny",
    f"model.vision.architecture={{model_type: clip_vision_model, image_size: 112, patch_size: 14, {LAYERS}}}",
    f"model.language.architecture={{model_type: llama, {LAYERS}}}",
    "+model.language.architecture.vocab_size=16000",
    "model/vision=clip_tiny",
    "stage.feature_cache_mb=0",
    "data.max_length=256",
]
RECIPES = {
    "llava": LLAVA,
    "lora": [*LLAVA, "+stage.lora.language.rank=64"],
    "diffusion": ["experiment=diffusion/ddpm_tiny", "model/denoiser=dit_tiny", "model.denoiser.depth=16"]
    + ["model.denoiser.width=1024", "model.denoiser.heads=16", "data.size=64", "callbacks.ema=null"],
}
VARIANTS = {
    "": [],
    "-checkpointing": ["trainer.gradient_checkpointing=true"],
    "-fsdp": ["trainer.strategy=fsdp", "trainer.devices=2"],
    "-fsdp-checkpointing": ["trainer.strategy=fsdp", "trainer.devices=2", "trainer.gradient_checkpointing=true"],
    "-bf16-mixed": ["trainer.precision=bf16-mixed"],
}


def overrides(case: str, tokenizer: str) -> list[str]:
    recipe = next(name for name in RECIPES if case.startswith(name))
    variant = VARIANTS[case.removeprefix(recipe)]
    ranks = 2 if "trainer.devices=2" in variant else 1
    batch = ["data.micro_batch=2", f"data.global_batch={2 * ranks}"]
    own = [] if recipe == "diffusion" else [f"model.language.tokenizer={tokenizer}"]
    return [*RECIPES[recipe], *own, *batch, "trainer.accelerator=cpu", "trainer.precision=32-true", *variant]


class Measure(lightning.Callback):
    """Notes the resident peaks of the last step: of its passes, and of its update."""

    def __init__(self) -> None:
        self.before, self.peaks = status("VmRSS"), [0, 0]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.peaks[0] = status("VmHWM") - self.before
        Path("/proc/self/clear_refs").write_text("5")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.peaks[1] = status("VmHWM") - self.before


def status(field: str) -> int:
    """A field of this process's status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(case: str, tokenizer: str, out: Path) -> None:
    """Train a case in this process, as one of its ranks."""
    cfg = compose("train", overrides(case, tokenizer))
    callback = Measure()
    model = build(cfg.model)
    stage = build_around(model, cfg)
    stage.kept, stage.sources = [], {}
    if cfg.stage.lora:
        put_on_adapters(stage, list(cfg.stage.lora))
    batch = largest_batch(stage, OmegaConf.to_object(cfg.data))
    data: Any = SimpleNamespace(accumulation=lambda world: 1)
    trainer = build_trainer(cfg.trainer, out.parent, None, [callback], data, 2)
    trainer.fit(stage, DataLoader([batch] * 2, batch_size=None))  # type: ignore[arg-type]
    if rank() == 0:
        out.write_text(json.dumps(callback.peaks))


def main(words: list[str]) -> None:
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment |= {"MALLOC_TRIM_THRESHOLD_": "0", "CUDA_VISIBLE_DEVICES": ""}
    cases = [recipe + variant for recipe in RECIPES for variant in VARIANTS]
    print(f"{'GiB':<24}{'passes: predicted, measured':>32}{'update: predicted, measured':>36}")
    with tempfile.TemporaryDirectory() as folder:
        index, _ = write_shards(shapes(64), Path(folder) / "shards", total=64, quiet=True)
        tokenizer = str(Path(folder) / "tokenizer")
        train_tokenizer([index], Path(tokenizer), quiet=True)
        for case in [case for case in cases if not words or any(word in case for word in words)]:
            out = Path(folder) / "peak"
            command = [sys.executable, __file__, "--measure", case, tokenizer, str(out)]
            subprocess.run(
                command,
                env={**os.environ, **environment},
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            plan = estimate(compose("train", overrides(case, tokenizer)))
            pairs = zip((plan.passes, plan.step), json.loads(out.read_text()), strict=True)
            columns = [f"{p / GIB:>14.2f}{m / GIB:>10.2f}{100 * (p / m - 1):>+8.1f} %" for p, m in pairs]
            print(f"{case:<24}{''.join(columns)}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    else:
        main(sys.argv[1:])
