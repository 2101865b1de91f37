"""Cross-entropy of an output layer, without all logits at once. Legend: S positions, D width, V vocabulary.

The logits of a chunk of positions turn into their gradient in place, and that into the gradients of the hidden states
and of the weight, all in the forward pass, as Liger's kernel does it (arXiv 2410.10989, section 3.2): as many products
as with all logits. torch's own `linear_cross_entropy` returns a sum of bf16 logits in bf16, and is slower on CPUs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmlab.weights import is_sharded

CHUNK = 1 << 23
"""Logits of a chunk: 32 MB in fp32."""
LARGE = 1 << 24
"""From so many logits on (64 MB in fp32), chunks are the default of a frozen layer: they take less time and memory."""
_NAMES = """
    afmoe apertus arcee aria_text bitnet codegen cwm diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe
    falcon flex_olmo gemma gemma3_text glm glm4 glm4_moe gpt2 gpt-sw3 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss
    gptj helium hunyuan_v1_dense internlm3 jais2 jetmoe llama minimax_m2 ministral ministral3 mistral mixtral
    nemotron olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3
    solar_open stablelm starcoder2
"""
LINEAR = frozenset(_NAMES.split())
"""Model types whose logits are a linear layer of `last_hidden_state` and no more; the tests compare each of them."""


def summed_cross_entropy(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
    """Cross-entropy summed over the positions, in fp32."""
    return F.cross_entropy(logits_SV.float(), targets_S, reduction="sum")


def by_chunks(model: Any, wanted: str, count: int, dtype: torch.dtype, device: str) -> bool:
    """Whether the loss of a batch is computed in chunks.

    Args:
        model: of transformers.
        wanted: the setting `model.language.loss`.
        count: supervised positions of the batch.
        dtype: of the embeddings.
        device: its type.
    """
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if wanted == "logits" or count == 0 or dtype == torch.float16:  # a scaler's factor is unknown in the forward pass
        return False
    head = linear_head(model)
    if head is None or wanted == "chunked":
        return head is not None
    # The gradient of the weight, summed chunk by chunk, takes the time and memory that chunks save.
    return count * head.out_features >= LARGE and not head.weight.requires_grad


def linear_head(model: Any) -> nn.Linear | None:
    """The output layer of a transformers model if its logits are a plain linear layer of the last hidden states.

    It is not with an adapter or 4-bit weights, nor with a scale or a cap of the logits (Gemma 2, Cohere, Granite). With
    FSDP its weight is whole within the methods of the part that gather weights.
    """
    head = model.get_output_embeddings()
    capped = getattr(model.config, "final_logit_softcapping", None)
    if type(head) is not nn.Linear or model.config.model_type not in LINEAR or capped or is_sharded(head.weight):
        return None
    return head


def chunked_cross_entropy(
    hidden_SD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_S: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Cross-entropy of a linear layer, summed over the positions, in fp32 (fp64 of fp64).

    Args:
        hidden_SD: the layer's input; under autocast the products are computed in its dtype.
        weight_VD, bias_V: of the layer.
        targets_S: int64.
        chunk: logits at a time.
    """
    device = hidden_SD.device.type
    if torch.is_autocast_enabled(device) and hidden_SD.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden_SD, weight_VD = hidden_SD.to(dtype), weight_VD.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    with torch.autocast(device, enabled=False):
        return _Chunked.apply(hidden_SD, weight_VD, bias_V, targets_S, max(1, chunk // len(weight_VD)))  # type: ignore[no-any-return]


class _Chunked(torch.autograd.Function):
    """Arguments of `apply`: see `chunked_cross_entropy`, with the number of positions of a chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_S: Tensor, rows: int
    ) -> Tensor:
        learns = ctx.needs_input_grad
        exact = torch.promote_types(hidden_SD.dtype, torch.float32)
        hidden = torch.empty_like(hidden_SD) if learns[0] else None
        weight = torch.zeros_like(weight_VD, dtype=exact) if learns[1] else None
        bias = torch.zeros_like(weight_VD[:, 0], dtype=exact) if learns[2] else None
        loss = torch.zeros((), dtype=exact, device=hidden_SD.device)
        for h, t, out in zip(
            hidden_SD.split(rows),
            targets_S.split(rows),
            hidden_SD.split(rows) if hidden is None else hidden.split(rows),
            strict=True,
        ):
            z = F.linear(h, weight_VD, bias_V).to(exact)
            z -= z.amax(1, keepdim=True)
            picked = z.gather(1, t[:, None])
            total = z.exp_().sum(1, keepdim=True)
            loss += (total.log() - picked).sum()
            if not any(learns):
                continue
            z /= total
            z.scatter_add_(1, t[:, None], -torch.ones_like(picked))
            if bias is not None:
                bias += z.sum(0)
            gradient = z.to(hidden_SD.dtype)
            if hidden is not None:
                torch.mm(gradient, weight_VD, out=out)
            if weight is not None and weight.dtype == gradient.dtype:
                weight.addmm_(gradient.T, h)
            elif weight is not None:
                weight += gradient.T @ h
        ctx.gradients = hidden, weight, bias
        ctx.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *scales: Tensor) -> Any:
        hidden, weight, bias = ctx.gradients
        return (
            None if hidden is None else hidden * scales[0].to(hidden.dtype),
            None if weight is None else (weight * scales[0]).to(ctx.dtypes[0]),
            None if bias is None else (bias * scales[0]).to(ctx.dtypes[1]),
            None,
            None,
        )
