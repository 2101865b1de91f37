"""What attention of packed rows costs as rows grow, and what the loss costs as the vocabulary grows.

A step (forward and backward) of one layer of a 135M model, on one row of eight texts and on one of a picture with ten
questions: with a dense mask, in the ways that this machine can run, and with a row for each segment. Then the output
layer with its loss, all logits at once and by chunks. Rounds are interleaved; medians of seconds (on a CPU those of one
core) and the peak memory of tensors go into `attention_cost.csv` and `attention_cost.png`. The gradients of all ways
must agree. About three minutes on one core.

    python benchmarks/attention_cost.py [folder]
"""

import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional as F

from mmlab.data.shard_files import write_shards
from mmlab.data.sources.shapes import shapes
from mmlab.data.tokenizer import train_tokenizer
from mmlab.model import language as language_module
from mmlab.model.config import LanguageModelConfig
from mmlab.model.language import LanguageModel
from mmlab.model.output_loss import chunked_cross_entropy, summed_cross_entropy
from mmlab.model.row_blocks import Layout
from mmlab.training.live_memory import LiveMemory

ROUNDS = 3
LENGTHS = (512, 1024, 2048, 4096)
VOCABULARIES = (32_768, 49_152, 131_072, 262_144)
WIDTH, POSITIONS = 576, 384
SIZE = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 1,
    "max_position_embeddings": max(LENGTHS),
}
ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
WAYS = ("dense", "flex", "varlen", "separate") if ON_GPU else ("dense", "blocks", "separate")
Row = dict[str, Any]


class RealMemory(LiveMemory):
    """Of tensors with values, which say what a mask selects."""

    def _places(self, index: Tensor | None) -> list[Tensor | None]:
        return [index]


def row_of(kind: str, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Segments, contexts and places `[1, T]` of eight texts, or of a picture (two thirds) and ten questions."""
    picture = length * 2 // 3
    sizes = [length // 8] * 8 if kind == "texts" else [picture, *[(length - picture) // 10] * 10]
    parts: list[tuple[int, int, int, int]] = []
    for number, size in enumerate(sizes, 1):
        shared = kind == "questions" and number > 1
        parts.append((number, int(shared), picture * shared, size))
    columns = [
        torch.stack([torch.full((size,), number), torch.full((size,), context), torch.arange(start, start + size)])
        for number, context, start, size in parts
    ]
    ids = F.pad(torch.cat(columns, 1), (0, length - sum(sizes)))[:, None]
    return ids[0], ids[1], ids[2]


def seconds(step: Callable[[], Tensor]) -> tuple[float, Tensor]:
    clock = time.perf_counter if ON_GPU else time.process_time
    start = clock()
    result = step()
    if ON_GPU:
        torch.cuda.synchronize()
    return clock() - start, result


def peak(step: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that a step makes, at its peak."""
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with RealMemory() as live:
        step()
    return live.peak


def compare(steps: dict[str, Callable[[], Tensor]], about: Row) -> list[Row]:
    """Time and memory of each way; their results must be equal."""
    memory = {way: peak(step) for way, step in steps.items()}
    times: dict[str, list[float]] = {way: [] for way in steps}
    results: dict[str, Tensor] = {}
    for _ in range(ROUNDS):
        for way, step in steps.items():
            taken, results[way] = seconds(step)
            times[way].append(taken)
    expected = next(iter(results.values())).float()
    rows = []
    for way in steps:
        error = float((results[way].float() - expected).abs().max() / expected.abs().max())
        assert error < (3e-2 if ON_GPU else 1e-4), f"{way} differs by {error:.1e}"
        rows.append({**about, "way": way, "seconds": statistics.median(times[way]), "bytes": memory[way]})
        print(f"{about} {way:<9} {rows[-1]['seconds'] * 1000:>9.1f} ms {memory[way] / 2**20:>9.1f} MiB", flush=True)
    return rows


def attention_rows(tokenizer: Path) -> list[Row]:
    config = LanguageModelConfig(init="random", architecture=SIZE, tokenizer=str(tokenizer))
    model = LanguageModel(config).to(DEVICE, DTYPE)
    rows: list[Row] = []
    for kind in ("texts", "questions"):
        for length in LENGTHS:
            ids = row_of(kind, length)
            layout = Layout(ids[0], ids[1])
            segments, contexts, places = (x.to(DEVICE) for x in ids)
            embeds = torch.randn(1, length, WIDTH, device=DEVICE, dtype=DTYPE)

            def step(way: str, embeds: Tensor = embeds, ids: Any = (segments, contexts, places), layout: Any = layout):
                language_module.choose = lambda *_: way
                x = embeds.clone().requires_grad_()
                model.zero_grad(set_to_none=True)
                logits = model(x, ids[0] > 0, *ids, layout)
                logits.float().square().sum().backward()
                assert x.grad is not None
                return x.grad

            # A row for each question has the picture ten times.
            without = {"varlen", "separate"} if length > 2048 else {"varlen"}
            ways = [way for way in WAYS if not (layout.shares and way in without)]
            steps = {way: lambda way=way, step=step: step(way) for way in ways}
            rows += compare(steps, {"part": kind, "size": length})
    return rows


def loss_rows() -> list[Row]:
    rows: list[Row] = []
    for vocabulary in VOCABULARIES:
        hidden = torch.randn(POSITIONS, WIDTH, device=DEVICE, dtype=DTYPE)
        weight = (0.05 * torch.randn(vocabulary, WIDTH, device=DEVICE, dtype=DTYPE)).requires_grad_()
        targets = torch.randint(0, vocabulary, (POSITIONS,), device=DEVICE)

        def step(chunks: bool, hidden: Tensor = hidden, weight: Tensor = weight, targets: Tensor = targets) -> Tensor:
            x, weight.grad = hidden.clone().requires_grad_(), None
            if chunks:
                loss = chunked_cross_entropy(x, weight, None, targets)
            else:
                loss = summed_cross_entropy(F.linear(x, weight), targets)
            loss.backward()
            assert x.grad is not None
            return x.grad

        steps = {"logits": lambda step=step: step(False), "chunked": lambda step=step: step(True)}
        rows += compare(steps, {"part": "loss", "size": vocabulary})
    return rows


def draw(rows: list[Row], target: Path) -> None:
    parts = {"texts": "tokens, eight texts", "questions": "tokens, a picture and ten questions", "loss": "vocabulary"}
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    for column, (part, label) in enumerate(parts.items()):
        ways = dict.fromkeys(row["way"] for row in rows if row["part"] == part)
        for way in ways:
            chosen = [row for row in rows if row["part"] == part and row["way"] == way]
            sizes = [row["size"] for row in chosen]
            axes[0][column].plot(sizes, [row["seconds"] for row in chosen], marker="o", label=way)
            axes[1][column].plot(sizes, [row["bytes"] / 2**30 for row in chosen], marker="o", label=way)
        for axis, name in ((axes[0][column], "seconds a step"), (axes[1][column], "GiB at the peak")):
            axis.set(xlabel=label, ylabel=name, xscale="log", yscale="log")
            axis.legend()
    figure.savefig(target)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if not ON_GPU:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        index, _ = write_shards(shapes(8, max_objects=2), Path(scratch) / "shards", total=8, quiet=True)
        train_tokenizer([index], Path(scratch) / "tokenizer", quiet=True)
        rows = attention_rows(Path(scratch) / "tokenizer")
    rows += loss_rows()
    with (folder / "attention_cost.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, folder / "attention_cost.png")


if __name__ == "__main__":
    main()
