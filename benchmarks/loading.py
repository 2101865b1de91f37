"""Memory and time of loading a language model's checkpoint of 2 GB, beside transformers' `from_pretrained`.

The checkpoint is random and written to a temporary folder: as safetensors or as two shards of `pytorch_model.bin`, in
fp32 or fp16, and used in fp32 or bf16. Ours includes what a start does with a frozen part: it reads the weights, checks
that they are finite, hashes them, and casts what training casts. `private` is the peak of anonymous memory above that
before loading, `resident` that of all memory, the file's own pages included, `share` what a process has in the end when
pages of several are divided among them; all in bytes of the checkpoint. The files are in the page cache. Each
measurement is a process of its own; rounds are interleaved, and medians are reported.

    python benchmarks/loading.py [rounds]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mmlab.model.config import LanguageModelConfig
from mmlab.model.language import LanguageModel, LanguageOnly
from mmlab.stage.assembly import read_in_bf16
from mmlab.training.artifacts import describe_frozen
from mmlab.training.filling import fill_parts

SIZE = 2 << 30
CASES = [
    (layout, stored, used)
    for layout in ("safetensors", "bin")
    for stored, used in (("float32", "float32"), ("float16", "bfloat16"), ("bfloat16", "bfloat16"))
]
WIDTH, VOCABULARY = 2048, 32000


def write(folder: Path, layout: str, dtype: torch.dtype) -> int:
    """Write a checkpoint of about `SIZE` bytes; returns its bytes."""
    layer = 4 * WIDTH * WIDTH + 3 * WIDTH * 5632 + 2 * WIDTH
    layers = (SIZE // dtype.itemsize - 2 * VOCABULARY * WIDTH) // layer
    sizes = {"hidden_size": WIDTH, "intermediate_size": 5632, "num_hidden_layers": layers, "num_attention_heads": 16}
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, dtype=str(dtype).removeprefix("torch."), **sizes)
    with torch.device("meta"):
        names = {name: weight.shape for name, weight in AutoModelForCausalLM.from_config(config).state_dict().items()}
    folder.mkdir()
    config.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"<s>": 0, "</s>": 1}, [])), bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    order, half = list(names), len(names) // 2
    parts = [order] if layout == "safetensors" else [order[:half], order[half:]]
    places, total = {}, 0
    for i, part in enumerate(parts):
        tensors = {name: torch.empty(names[name], dtype=dtype).normal_(std=0.02) for name in part}
        total += sum(tensor.nbytes for tensor in tensors.values())
        if layout == "safetensors":
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        else:
            file = f"pytorch_model-{i + 1:05}-of-{len(parts):05}.bin"
            torch.save(tensors, folder / file)
            places |= dict.fromkeys(part, file)
    if places:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return total


def memory() -> dict[str, int]:
    """Bytes of this process: all, those of its own, and its share of all."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    sizes = {fields[0].rstrip(":"): int(fields[1]) * 1024 for fields in lines}
    return {"resident": sizes["Rss"], "private": sizes["Anonymous"], "share": sizes["Pss"]}


def ours(folder: str, used: torch.dtype) -> object:
    model = LanguageOnly(LanguageModel(LanguageModelConfig(source=folder)))
    model.requires_grad_(False)
    if used == torch.bfloat16:
        read_in_bf16(model, ["language"])
    fill_parts(model, [])
    describe_frozen(model, [])
    return model.to(used)


def theirs(folder: str, used: torch.dtype) -> object:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=used, local_files_only=True)
    for weight in model.parameters():  # what is mapped is read when it is used
        weight.aminmax()
    return model


def measure(how: str, folder: str, used: str) -> None:
    """Load once, in this process; print its peaks and seconds, and its share of memory when all have loaded."""
    torch.set_num_threads(1)
    before, peaks, done = memory(), memory(), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for key, value in memory().items():
                peaks[key] = max(peaks[key], value)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    model = {"ours": ours, "transformers": theirs}[how](folder, getattr(torch, used))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print("loaded", flush=True)
    sys.stdin.readline()
    result = {key: peaks[key] - before[key] for key in ("private", "resident")}
    print(json.dumps({**result, "share": memory()["share"] - before["share"], "seconds": seconds}), flush=True)
    sys.stdin.readline()
    del model


def run(how: str, folder: Path, used: str, processes: int) -> list[dict[str, float]]:
    """Load in some processes at once; what each measured."""
    command = [sys.executable, __file__, "measure", how, str(folder), used]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    children = [subprocess.Popen(command, **pipes) for _ in range(processes)]  # type: ignore[call-overload]

    def each(expected: str | None) -> list[str]:
        lines = [child.stdout.readline() for child in children]
        assert all(line and expected in (None, line.strip()) for line in lines), (how, folder, lines)
        return lines

    def go_on() -> None:
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()

    each("ready")
    go_on()
    each("loaded")
    go_on()
    results = [json.loads(line) for line in each(None)]
    go_on()
    for child in children:
        child.wait()
    return results


def main(rounds: int) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as base:
        for layout, stored, used in CASES:
            folder = Path(base) / f"{layout}-{stored}"
            size = write(folder, layout, getattr(torch, stored))
            results: dict[str, list[dict[str, float]]] = {}
            for _ in range(rounds):
                for how in ("ours", "transformers"):
                    for processes in (1, 2):
                        results.setdefault(f"{how}, {processes}", []).extend(run(how, folder, used, processes))
            print(f"{layout}, {stored} used in {used}: {size / 1e9:.2f} GB", flush=True)
            for name, each in results.items():
                middle = {key: statistics.median(result[key] for result in each) for key in each[0]}
                print(
                    f"  {name + ' at once':<26} private {middle['private'] / size:5.2f} B  "
                    f"resident {middle['resident'] / size:5.2f} B  share {middle['share'] / size:5.2f} B  "
                    f"{middle['seconds']:5.1f} s"
                )
            for path in folder.iterdir():
                path.unlink()


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:])
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 3)
