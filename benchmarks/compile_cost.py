"""Training steps of layers that run as they are and compiled, and how long the first compiled step takes.

A 135M language model (rows of eight texts), DiT-S/2 and a tiny UNet, each in two processes: the first with an empty
cache of kernels, the second with what the first one has left. In the second, steps alternate between both ways.

    python benchmarks/compile_cost.py [case ...]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlab.model.compiled_layers import CompiledLayers
from mmlab.model.config import DiTConfig, KLAutoencoderConfig, LanguageModelConfig, UNetConfig
from mmlab.runs.compiler import CACHE
from mmlab.training.cpu_products import products, use_products

PAIRS = 7
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "max_position_embeddings": 2048,
}


def language(length: int) -> tuple[Any, Callable[[], Tensor]]:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from mmlab.model.language import LanguageModel
    from mmlab.model.row_blocks import Layout

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "<pad>": 2}, merges=[]))
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
        model = LanguageModel(LanguageModelConfig(init="random", architecture=LLAMA, tokenizer=folder)).to(DEVICE)
    text = length // 8
    segments, places = torch.arange(8).repeat_interleave(text)[None] + 1, torch.arange(text).repeat(8)[None]
    ids = torch.randint(len(LLAMA), (1, length), device=DEVICE)
    keep = torch.arange(length, device=DEVICE)[None] % 4 == 0
    layout = Layout(segments, torch.zeros_like(segments))
    shown, contexts, columns = (x.to(DEVICE) for x in (segments, torch.zeros_like(segments), places))

    def loss() -> Tensor:
        return model.cross_entropy(model.embed(ids), keep, ids[keep], shown, contexts, columns, layout) / keep.sum()

    return model, loss


def dit() -> tuple[Any, Callable[[], Tensor]]:
    from mmlab.model.dit import DiT

    model = DiT(DiTConfig(depth=12, width=384, heads=6, patch=2), channels=4, vector_width=384).to(DEVICE)
    x, time_B = torch.randn(4, 4, 32, 32, device=DEVICE), torch.tensor([1, 200, 500, 900], device=DEVICE)
    vector = torch.randn(4, 384, device=DEVICE)
    return model, lambda: (model(x, time_B, {"vector": vector}) - x).square().mean()


def unet() -> tuple[Any, Callable[[], Tensor]]:
    from mmlab.model.denoiser import UNet

    architecture = {"block_out_channels": [64, 128, 128], "layers_per_block": 2, "norm_num_groups": 32}
    model = UNet(UNetConfig(architecture=architecture), 3).to(DEVICE)
    x, time_B = torch.randn(4, 3, 32, 32, device=DEVICE), torch.tensor([1, 200, 500, 900], device=DEVICE)
    return model, lambda: (model(x, time_B, {}) - x).square().mean()


def autoencoder() -> tuple[Any, Callable[[], Tensor]]:
    from mmlab.model.autoencoder import KLAutoencoder

    architecture = {"block_out_channels": [64, 128, 128], "layers_per_block": 2, "latent_channels": 4}
    model = KLAutoencoder(KLAutoencoderConfig(init="random", architecture=architecture)).to(DEVICE)
    x = torch.rand(2, 3, 128, 128, device=DEVICE) * 2 - 1
    return model, lambda: (model.decode(model.encode(x).mean) - x).square().mean()


CASES: dict[str, Callable[[], tuple[Any, Callable[[], Tensor]]]] = {
    "language, 512 tokens": lambda: language(512),
    "language, 1024 tokens": lambda: language(1024),
    "DiT-S/2, 4 x 32 px latents": dit,
    "UNet, 4 x 32 px": unet,
    "autoencoder, 2 x 128 px": autoencoder,
}


def timed(model: Any, loss: Callable[[], Tensor]) -> tuple[float, float, float]:
    """Seconds, of the wall clock and of the processor, and the loss of a step without an optimizer."""
    model.zero_grad()
    start, used = time.perf_counter(), time.process_time()
    value = loss()
    value.backward()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - used, value.item()


def measure(case: str, pairs: int) -> dict[str, Any]:
    torch.manual_seed(0)
    use_products(products("auto", "auto" if ON_GPU else "cpu"))  # of eager steps only, as in a run
    model, loss = CASES[case]()
    layers = CompiledLayers(model.train())
    with torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU):
        plain = timed(model, loss)
        layers.on = True
        first, _, value = timed(model, loss)
        assert abs(value - plain[2]) < (1e-2 if ON_GPU else 1e-4), "compiled layers compute something else"
        times: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
        for _ in range(pairs):
            for layers.on in (False, True):
                times[layers.on].append(timed(model, loss))
    clock = 0 if ON_GPU else 1
    medians = {on: statistics.median(row[clock] for row in rows) for on, rows in times.items() if rows}
    return {"first": first, "eager": medians.get(False), "compiled": medians.get(True)}


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
        return
    wanted = sys.argv[1:] or list(CASES)
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(wanted):
            env = {**os.environ, CACHE: str(Path(folder, str(number)))}
            rows = []
            for pairs in (0, PAIRS):
                command = [sys.executable, __file__, "--measure", case, str(pairs)]
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
            cold, warm = rows
            print(
                f"{case:<28} first step {cold['first']:6.1f} s, from the cache {warm['first']:5.1f} s; then "
                f"{warm['eager'] * 1000:7.0f} ms eager, {warm['compiled'] * 1000:7.0f} ms compiled "
                f"({warm['eager'] / warm['compiled']:.2f} x)",
                flush=True,
            )


if __name__ == "__main__":
    main()
