"""Memory of each of two ranks that train a LLaVA with `trainer=fsdp`, from reading its weights to its artifacts.

The language model's checkpoint is random, written to a temporary folder as fp16 or fp32, and used in fp32 on two CPU
ranks (gloo). Cases: it is trained; the same run resumes for one more step; it is frozen and sharded; it has an adapter.
For each phase the peak of each rank's own memory is printed: of what is not mapped from a file (RssAnon), above that
before the model was built, as a multiple of all weights in fp32. A rank's share is 0.5: of the weights, and while it is
trained of gradients and of each moment. `group` are the weights that are gathered together, at most.

Freed memory is returned at once, as large tensors' always is. With 8 layers the weights are 1 GB in fp32.

    python benchmarks/sharded_memory.py [layers]
"""

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mmlab.data.shard_files import write_shards
from mmlab.data.sources.shapes import shapes
from mmlab.data.tokenizer import train_tokenizer

WIDTH, INNER, VOCABULARY = 1536, 4096, 4000
LAYER = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH
TWO_STEPS = ["trainer.max_steps=2"]
CASES = {
    "trained": TWO_STEPS,
    "resumed": ["trainer.max_steps=3"],
    "frozen": [*TWO_STEPS, "stage=align", "stage.prompt.system=''"],
    "adapter": [*TWO_STEPS, "+stage.lora.language={rank: 16, alpha: 32}"],
}
PHASES = ("fill", "hash", "shard", "read", "step", "save", "gather", "artifacts")


def write(folder: Path, tokenizer: Path, layers: int, dtype: torch.dtype) -> None:
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 12}
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, dtype=str(dtype).removeprefix("torch."), **sizes)
    with torch.device("meta"):
        names = {name: weight.shape for name, weight in AutoModelForCausalLM.from_config(config).state_dict().items()}
    folder.mkdir()
    config.save_pretrained(folder)
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = {name: torch.empty(shape, dtype=dtype).normal_(std=0.02) for name, shape in names.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def own_memory() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Peaks:
    """The peak of this process's own memory in each phase; a phase lasts while a function runs."""

    def __init__(self) -> None:
        self.phase, self.peaks, self.before = "", {}, 0
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while True:
            self.note()
            threading.Event().wait(0.01)

    def note(self) -> None:
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), own_memory())

    def during(self, phase: str, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            ctypes.CDLL(None).malloc_trim(0)
            before, self.phase = self.phase, phase
            self.before = self.before or own_memory()
            try:
                return function(*args, **options)
            finally:
                self.note()
                self.phase = before

        setattr(owner, name, call)


def measure(folder: str, *overrides: str) -> int:
    """Train in this process, one of two ranks; write its peaks."""
    from mmlab import cli
    from mmlab.stage import assembly
    from mmlab.training import artifacts, gathering, sharding, step_loop
    from mmlab.training.checkpoint_io import FolderCheckpointIO

    torch.set_num_threads(1)
    watched = Peaks()
    for phase, owner, name in (
        ("fill", assembly, "build_stage"),
        ("hash", artifacts, "describe_frozen"),
        ("shard", sharding.ShardedStrategy, "shard"),
        ("read", FolderCheckpointIO, "load_mapped"),
        ("read", sharding, "restore_module"),
        ("read", sharding, "restore_optimizer"),
        ("step", step_loop.StepEpochLoop, "advance"),
        ("save", FolderCheckpointIO, "save_sharded"),
        ("gather", gathering, "gather"),
        ("artifacts", artifacts, "save_parts"),
    ):
        watched.during(phase, owner, name)
    code = cli.main(["train", *overrides])
    above = {phase: watched.peaks.get(phase, 0) - watched.before for phase in PHASES if phase in watched.peaks}
    Path(folder, f"rank-{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(above))
    return code


def run(folder: Path, case: str, source: Path) -> list[dict[str, int]]:
    overrides = [
        "experiment=llava/finetune_tiny",
        "model/language=pretrained",
        f"model.language.source={source}",
        "trainer=fsdp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.precision=32-true",
        "trainer.fsdp.whole_below=0",
        "trainer.limit_val_batches=0",
        "logger=none",
        "callbacks.samples=null",
        "stage.init_from=[]",
        f"data.root={folder / 'data'}",
        "data.global_batch=2",
        "data.micro_batch=1",
        f"run.root={folder}",
        f"run.name={'trained' if case == 'resumed' else case}",
        *CASES[case],
    ]
    command = [sys.executable, __file__, "measure", str(folder), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def main(layers: int) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    whole, group = 4 * (layers * LAYER + 2 * VOCABULARY * WIDTH), 4 * max(LAYER, 2 * VOCABULARY * WIDTH)
    print(f"{whole / 1e9:.2f} GB in fp32, group {group / whole:.2f}")
    for dtype in (torch.float16, torch.float32):
        with tempfile.TemporaryDirectory() as base:
            folder = Path(base)
            index, _ = write_shards(shapes(8), folder / "data" / "train", total=8, quiet=True)
            write_shards(shapes(8), folder / "data" / "val", total=8, quiet=True)
            train_tokenizer([index], folder / "tokenizer", quiet=True)
            write(folder / "language", folder / "tokenizer", layers, dtype)
            print(f"{dtype!s:<14}" + "".join(f"{phase:>12}" for phase in PHASES), flush=True)
            for case in CASES:
                ranks = run(folder, case, folder / "language")
                cells = ["/".join(f"{rank[p] / whole:.2f}" for rank in ranks if p in rank) for p in PHASES]
                print(f"{case:<14}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        sys.exit(measure(*sys.argv[2:]))
    main(int(sys.argv[1]) if sys.argv[1:] else 8)
