"""How tokens of rows attend to each other in a transformers model: one function, `choose`, decides for each batch.

`attend` is registered as an attention implementation of transformers. Without a mask it is transformers' SDPA with
plain causal attention. Otherwise it gets what `rows_mask` made, also when a checkpointed layer runs again.

Legend: B rows, T tokens, H heads, D width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmlab.model.flex_mask import flex_mask
from mmlab.model.packed_rows import MASKED, ROWS, each_kind, masks, takes_masks, window_of
from mmlab.model.row_blocks import BlockRows, Layout, VarlenRows

AUTO = "auto"
KINDS = ("blocks", "flex", "varlen")
SHORT = 256
"""Rows of up to so many tokens get a dense mask on a CPU: blocks would save about a tenth of a step."""
FLEX_WIDTH = 16
"""Least width of a head for FlexAttention's kernels."""
DENSE = frozenset(["diffllama", "doge", "gpt_bigcode", "gpt-sw3"])
"""Model types that read a mask in their own code, so that it has to be a tensor."""


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: `[B, T, H, D]` of queries, keys and values `[B, heads, T, D]`."""
    if isinstance(attention_mask, BlockRows | VarlenRows):
        options.pop("is_causal", None)
        return attention_mask.attend(module, query, key, value, **options), None  # type: ignore[attr-defined]
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, **options)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(ROWS, attend)
AttentionMaskInterface.register(ROWS, sdpa_mask)


def implementation(cls: Any, kind: str, attention: str) -> str:
    """The attention implementation of transformers to use for a class of models.

    Args:
        cls: of the model.
        kind: its model type.
        attention: the setting; sdpa is eager for models that do not have it.
    """
    ours = attention in (AUTO, *KINDS)
    if ours and cls._supports_sdpa and cls._supports_attention_backend and kind in MASKED - DENSE:
        return ROWS
    if ours or attention == "sdpa":
        return "sdpa" if cls._supports_sdpa else "eager"
    return attention


def choose(model: Any, wanted: str, packed: bool | Layout, embeds_BTD: Tensor) -> str:
    """How a batch attends, the fastest way that can run: by measurement on a CPU (`benchmarks/attention_cost.py`).

    Args:
        model: of transformers.
        wanted: the setting `model.language.attention`.
        packed: whether a row has several segments; their layout if it was read on the host.
        embeds_BTD: of the batch.

    Returns:
        plain (causal, without a mask), varlen (flash kernels for texts of different length), flex (FlexAttention with a
        block mask), blocks (SDPA on each block of a row), dense (one mask with all pairs of tokens), or separate (a
        model that takes no mask gets a row for each segment).
    """
    config, device, length = model.config, embeds_BTD.device.type, embeds_BTD.shape[1]
    if packed and not takes_masks(config):
        return "separate"
    windowed = device == "cuda" and takes_masks(config) and window_of(config, length) is not None
    if not packed and not windowed:
        return "plain"
    if config._attn_implementation != ROWS:
        return "dense" if packed else "plain"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    half = (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embeds_BTD.dtype).itemsize == 2
    layout = isinstance(packed, Layout)
    drops = model.training and any(
        value for name, value in config.to_dict().items() if "drop" in name and "att" in name
    )
    runs = {
        "varlen": device == "cuda" and layout and not packed.shares and half and size % 8 == 0 and size <= 256,
        "flex": device == "cuda" and size >= FLEX_WIDTH,  # on a CPU it has no backward pass
        "blocks": device == "cpu" and (length > SHORT or wanted == "blocks"),
    }
    runs = {kind: runs[kind] and not (drops and kind != "blocks") for kind in runs}
    if runs.get(wanted):
        return wanted
    return next((kind for kind, fits in runs.items() if fits), "dense" if packed else "plain")


def described(kind: str, wanted: str) -> str:
    """A sentence about how a batch attends.

    Args:
        kind: as `choose` returned it.
        wanted: the setting `model.language.attention`.
    """
    what = {
        "plain": "causal, without a mask",
        "varlen": "flash kernels for texts of different length",
        "flex": "FlexAttention with a block mask",
        "blocks": "SDPA on each block of a row",
        "dense": "one mask with all pairs of tokens",
        "separate": "a row for each segment",
    }[kind]
    instead = (
        f", because attention={wanted} cannot run here" if wanted in KINDS and kind not in (wanted, "plain") else ""
    )
    return f"attention of the language model: {kind} ({what}){instead}"


def rows_mask(
    kind: str,
    config: Any,
    packed: bool | Layout,
    segment_ids_BT: Tensor,
    context_ids_BT: Tensor,
    position_ids_BT: Tensor,
    dtype: torch.dtype,
) -> Any:
    """What a model gets as its attention mask, or the masks of its types of layers.

    Args:
        kind: as `choose` returns it, of those with a mask.
        config: of the model.
        packed: see `choose`.
        segment_ids_BT, context_ids_BT, position_ids_BT: see `packed_rows.masks`.
        dtype: of the scores of a dense mask.
    """
    ids = segment_ids_BT, context_ids_BT, position_ids_BT
    shape = segment_ids_BT.shape
    if kind == "dense":
        return masks(config, *ids, dtype)
    if kind == "flex":
        return each_kind(config, shape[1], lambda window: flex_mask(*ids, window))
    layout = packed if isinstance(packed, Layout) else Layout(segment_ids_BT, context_ids_BT)
    if kind == "varlen":
        return each_kind(config, shape[1], lambda window: VarlenRows(layout, shape, segment_ids_BT.device, window))
    return each_kind(config, shape[1], lambda window: BlockRows(layout, *ids, window, dtype))
