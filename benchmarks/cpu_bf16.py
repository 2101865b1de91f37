"""Training steps on a CPU in fp32 and under autocast to bf16, as with trainer.precision=bf16-mixed.

fp32 products are those that `trainer.products=auto` takes. Rounds are interleaved; medians of CPU time.

    python benchmarks/cpu_bf16.py [ROUNDS]
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mmlab.runs.freed_memory import keep_freed_memory
from mmlab.training.cpu_products import products, use_products


def step(model: nn.Module, loss: Callable[[nn.Module], Tensor], mixed: bool) -> None:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        value = loss(model)
    value.backward()


def llama(width: int, vocabulary: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=4, vocab_size=vocabulary,
            num_attention_heads=width // 64,
        )
    )  # fmt: skip


def cases() -> Iterator[tuple[str, nn.Module, Callable[[Any], Tensor]]]:
    """Name, model and loss."""
    ids = torch.randint(512, (4, 256))
    for width, vocabulary in ((128, 512), (576, 8192)):
        yield f"4 Llama layers, {width} wide, all learn", llama(width, vocabulary), lambda m: m(ids, labels=ids).loss
    inputs = torch.randn(4, 256, 576, requires_grad=True)
    frozen = llama(576, 8192).requires_grad_(False)
    yield "4 Llama layers, 576 wide, frozen", frozen, lambda m: m(inputs_embeds=inputs, labels=ids).loss
    latents, times, texts = torch.randn(4, 4, 32, 32), torch.arange(4), torch.randn(4, 16, 128)
    for widths in ((64, 128), (160, 320)):
        unet = UNet2DConditionModel(
            sample_size=32, layers_per_block=1, block_out_channels=widths, cross_attention_dim=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=8,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        name = f"UNet, {widths[0]} and {widths[1]} wide, 32 px"
        yield name, unet, lambda m: m(latents, times, texts).sample.float().square().mean()
    pixels = torch.randn(2, 3, 64, 64)
    vae = AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=16,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    yield "VAE, 32 and 64 wide, 64 px", vae, lambda m: m(pixels).sample.float().square().mean()


def main(rounds: int) -> None:
    torch.manual_seed(0)
    keep_freed_memory()
    kind = products("auto", "cpu")
    use_products(kind)
    bf16 = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()
    print(f"{torch.get_num_threads()} threads, fp32 by {kind}; avx512_bf16: {bf16[0]}, amx: {bf16[1]}")
    print(f"{'CPU ms a step':<40} {'fp32':>8} {'bf16':>8} {'ratio':>6} {'bf16, channels last':>20}")
    for name, model, loss in cases():
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        ways = [(model, False), (model, True), (last, True)]
        times: list[list[float]] = [[] for _ in ways]
        for _ in range(rounds + 1):
            for way, each in zip(ways, times, strict=True):
                start = time.process_time()
                step(way[0], loss, way[1])
                each.append(time.process_time() - start)
        fp32, mixed, ordered = (1000 * statistics.median(each[1:]) for each in times)
        print(f"{name:<40} {fp32:>8.1f} {mixed:>8.1f} {fp32 / mixed:>5.2f}x {ordered:>20.1f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
