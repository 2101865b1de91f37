"""Who sees whom in a packed row. Legend: B rows, T tokens."""

import torch
from torch import Tensor


def visible(segment_ids_BT: Tensor, context_ids_BT: Tensor) -> Tensor:
    """Return the bool `[B, T, T]` mask: query i sees key j.

    A token sees earlier tokens of its own segment and of its context segment (the picture that several
    questions share); padding (segment 0) sees nothing and is seen by nothing.

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
    """Turn a bool mask into the `[B, 1, T, T]` term that every transformers model adds to its scores.

    The lowest finite number stands for "not seen": minus infinity would make the softmax of a padding
    row, which sees nothing, NaN.
    """
    bias = torch.zeros(mask_BTT.shape, dtype=dtype, device=mask_BTT.device)
    return bias.masked_fill_(~mask_BTT, torch.finfo(dtype).min)[:, None]
