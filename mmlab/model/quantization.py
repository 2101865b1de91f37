"""4-bit weights of language models (NF4; QLoRA, arXiv 2305.14314), through bitsandbytes."""

import logging
import math
import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmlab.config.errors import ConfigError

BITS = 4.127
"""Of a weight: 4, and for each 64 of them a scale of 8 bits, and for each 256 scales one of 32 bits."""


def quantized_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers whose weights are stored in 4 bits: all linear ones but the output layer."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


@torch.no_grad()
def quantize(model: Any, dtype: torch.dtype) -> None:
    """Round the weights of a filled model to NF4, one layer after the other; a mapped weight never gets a copy.

    On a machine with a GPU each layer is rounded there, which is much faster, and comes back.

    Args:
        model: on the CPU.
        dtype: of what is not rounded, and of the values that a layer computes with.

    Raises:
        ConfigError: the model has no linear layers.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ConfigError(
            f"model.language.quantize: a {model.config.model_type} has no linear layers; leave it out for this model."
        )
    bnb = _bitsandbytes()
    place = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    for name in list(layers):
        layer = layers.pop(name)  # so that it is freed
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, False, quant_type="nf4", device="meta")
        weight = bnb.nn.Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4")
        new.weight, new.bias = weight.to(place).to("cpu"), layer.bias
        new.weight.quant_state.dtype = dtype  # with that of the checkpoint, training would round once more
        # On some CPUs bitsandbytes rounds the scales to bf16, for good, when a layer first runs without gradients:
        # after a validation a run would compute other values than one that resumes from it.
        new.support_avx512bf16_for_cpu = False
        model.set_submodule(name, new)
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    model.is_loaded_in_4bit = True  # peft reads it


def store_empty(model: Any) -> None:
    """Give a model on the meta device layers that take the memory of 4-bit weights, forward and backward."""
    for name, layer in quantized_layers(model).items():
        model.set_submodule(name, _EmptyLinear4bit(layer))


class _EmptyLinear4bit(nn.Linear):
    """A layer whose packed weight is dequantized for each product, as bitsandbytes does."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, False, device="meta")
        size = math.ceil(layer.weight.numel() * BITS / 8)
        packed: Any = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        packed.quant_state = SimpleNamespace(shape=layer.weight.shape)
        self.weight, self.bias = packed, layer.bias

    def forward(self, input: Tensor) -> Tensor:
        out = _Dequantized.apply(input, (self.out_features, self.in_features))
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Dequantized(torch.autograd.Function):
    """The product with a weight that exists only meanwhile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int]) -> Tensor:  # type: ignore[override]
        ctx.shape = shape
        with torch.enable_grad():  # as around it: a second pass is told from the backward pass by that
            return x.detach() @ x.new_empty(shape).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient @ gradient.new_empty(ctx.shape), None


@torch.no_grad()
def dequantize(model: Any) -> None:
    """Give a model with 4-bit weights plain layers with the same values."""
    bnb = _bitsandbytes()
    dtype = model.get_input_embeddings().weight.dtype
    for name, layer in quantized_layers(model).items():
        new = nn.Linear(layer.in_features, layer.out_features, False, device="meta")
        weight: Any = layer.weight
        values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        new.weight, new.bias = nn.Parameter(values.to(dtype), requires_grad=False), layer.bias
        model.set_submodule(name, new)
    model.is_loaded_in_4bit = False


def _bitsandbytes() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a package that speeds up its CPU kernels
    import bitsandbytes

    return bitsandbytes
