"""Rows of several segments, for every causal language model. Legend: B rows, T tokens, D width, R segments, L tokens.

A token attends to earlier tokens of its own segment and of its context segment (an image that several questions
share). Models in `MASKED` get that as an attention mask. All others get one row per segment, so that a model with a
recurrent state, or with positions or windows of its own, computes what it computes for each segment alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

_NAMES = """
    afmoe apertus arcee aria_text biogpt bitnet codegen cohere cohere2 cohere2_moe cwm diffllama doge dots1
    ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2
    gpt-sw3 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj granite granitemoe granitemoeshared helium
    hunyuan_v1_dense hunyuan_v1_moe internlm3 jais2 jetmoe llama minimax_m2 ministral ministral3 mistral mixtral
    modernbert-decoder nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe
    qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm
"""
MASKED = frozenset(_NAMES.split())
"""Model types whose attention reads positions and a mask exactly as they are given; the tests compare each of them."""

ROWS = "mmlab_rows"
"""transformers' name of our own attention, see `attention`."""

_WINDOWED = "sliding_attention"


def takes_masks(config: Any) -> bool:
    """Whether a transformers model can be given the masks of `masks` and positions."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        config.model_type in MASKED
        and kinds <= {"full_attention", _WINDOWED}
        and config._attn_implementation in ("sdpa", "eager", ROWS)  # others do not read a mask of this shape
        and not getattr(config, "alibi", False)
    )


def masks(
    config: Any, segment_ids_BT: Tensor, context_ids_BT: Tensor, position_ids_BT: Tensor, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Return the additive attention mask `[B, 1, T, T]` of packed rows, or one for each type of layer.

    Args:
        config: of a transformers model that `takes_masks`.
        segment_ids_BT, context_ids_BT: see `visible`.
        position_ids_BT: int64, the place of each token in its segment, after its context.
        dtype: of the scores.
    """
    seen = visible(segment_ids_BT, context_ids_BT)

    def mask(window: int | None) -> Tensor:
        near = window is None or position_ids_BT[:, :, None] - position_ids_BT[:, None, :] < window
        return additive(seen & near, dtype)

    return each_kind(config, seen.shape[-1], mask)


def each_kind(config: Any, length: int, mask: Callable[[int | None], Any]) -> Any:
    """Return the masks of a model's layers: one, or the one of each type of layer.

    Args:
        config: of a transformers model that `takes_masks`.
        length: of the rows.
        mask: of layers that attend to the last `window` tokens, or to all.
    """
    window = window_of(config, length)
    if window is None or not getattr(config, "layer_types", None):
        return mask(window)
    return {"full_attention": mask(None), _WINDOWED: mask(window)}


def window_of(config: Any, length: int) -> int | None:
    """Tokens to which a model's windowed layers attend; None if it has no such layers, or they see whole rows."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    return None if not window or length <= window or (kinds and _WINDOWED not in kinds) else window


def visible(segment_ids_BT: Tensor, context_ids_BT: Tensor) -> Tensor:
    """Return the bool `[B, T, T]` attention mask of packed rows: query i attends to key j.

    A token attends to earlier tokens of its own segment and of its context segment; padding (segment 0) takes no part.

    Args:
        segment_ids_BT: int64 `[B, T]`, 0 = padding.
        context_ids_BT: int64 `[B, T]`, 0 = no context.
    """
    length = segment_ids_BT.shape[1]
    query, key = segment_ids_BT[:, :, None], segment_ids_BT[:, None, :]
    context = context_ids_BT[:, :, None]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids_BT.device).tril()
    return causal & (key > 0) & ((key == query) | (key == context))


def additive(mask_BTT: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a bool mask to the `[B, 1, T, T]` term that every transformers model adds to its scores.

    Masked scores get the lowest finite number: minus infinity would make the softmax of a padding row NaN.
    """
    bias = torch.zeros(mask_BTT.shape, dtype=dtype, device=mask_BTT.device)
    return bias.masked_fill_(~mask_BTT, torch.finfo(dtype).min)[:, None]


def separate(
    embeds_BTD: Tensor, keep_BT: Tensor, segment_ids_BT: Tensor, context_ids_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Give every segment a row of its own, its context in front, padded on the right.

    Args:
        embeds_BTD: embeddings.
        keep_BT: bool, positions of which logits are wanted.
        segment_ids_BT, context_ids_BT: see `visible`.

    Returns:
        `[R, L, D]`, and bool `[R, L]`, the wanted positions in the same order (those of a context in its own row).
    """
    length = segment_ids_BT.shape[1]
    places: list[Tensor] = []
    owned: list[Tensor] = []
    for row, (segments, contexts) in enumerate(zip(segment_ids_BT.cpu(), context_ids_BT.cpu(), strict=True)):
        for number in segments[segments > 0].unique():
            own = segments == number
            context = contexts[own][0]
            columns = (own | ((segments == context) & (context > 0))).nonzero()[:, 0]
            places.append(row * length + columns)
            owned.append(own[columns])
    where = pad_sequence(places, batch_first=True).to(embeds_BTD.device)
    own = pad_sequence(owned, batch_first=True).to(embeds_BTD.device)  # padding, which repeats a token, is False
    return embeds_BTD.flatten(0, 1)[where], keep_BT.flatten()[where] & own
