"""The mask of packed rows for FlexAttention, from segments: nothing has an element for each pair of tokens.

Legend: B rows, T tokens, N blocks of tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

SIDE = 128
"""Tokens along a side of a block, as FlexAttention's kernels have it."""


class FlexRows(BlockMask):
    """A block mask with the number of dimensions that some models ask a mask for."""

    ndim = 4


def flex_mask(
    segment_ids_BT: Tensor, context_ids_BT: Tensor, position_ids_BT: Tensor, window: int | None = None
) -> FlexRows:
    """Return the block mask of packed rows; nothing is read from the device.

    A block of queries and keys is left out if no query of it may see a key of it. In the others the rule decides for
    each pair, but in those where it holds for all of them.

    Args:
        segment_ids_BT, context_ids_BT: see `packed_rows.visible`.
        position_ids_BT: int64, the place of each token in its segment, after its context.
        window: tokens that a token sees, itself and earlier ones; None: all.
    """
    length = segment_ids_BT.shape[1]
    short = -length % SIDE
    segments, contexts = F.pad(segment_ids_BT, (0, short)), F.pad(context_ids_BT, (0, short))
    places = F.pad(position_ids_BT, (0, short))

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own, other = segments[b, q], segments[b, k]
        seen = (q >= k) & (other > 0) & ((other == own) | (other == contexts[b, q]))
        return seen if window is None else seen & (places[b, q] - places[b, k] < window)

    # In a block of tokens, the segments have numbers from `low` to `high`, and their contexts from `first` to `last`.
    blocks = segments.unflatten(1, (-1, SIDE))
    far = torch.iinfo(segments.dtype).max
    low = torch.where(blocks > 0, blocks, far).amin(2)
    high = blocks.amax(2)
    shared = contexts.unflatten(1, (-1, SIDE))
    first = torch.where(shared > 0, shared, far).amin(2)
    last = shared.amax(2)
    number = torch.arange(low.shape[1], device=segments.device)
    query, key = number[:, None], number[None, :]
    within = (low[:, None, :] <= high[:, :, None]) & (high[:, None, :] >= low[:, :, None])
    context = (low[:, None, :] <= last[:, :, None]) & (high[:, None, :] >= first[:, :, None])
    some = (key <= query) & (within | context)
    one = (blocks == blocks[:, :, :1]).all(2) & (low < far)
    every = (key < query) & one[:, :, None] & one[:, None, :] & (low[:, :, None] == low[:, None, :])
    if window is not None:
        span = (query - key) * SIDE  # how far the first tokens of the two blocks are apart
        some &= context | (span - SIDE + 1 < window)
        every &= span + SIDE - 1 < window
    partly, wholly = (_sparse(mask) for mask in (some & ~every, every))
    return FlexRows.from_kv_blocks(*partly, *wholly, BLOCK_SIZE=SIDE, mask_mod=rule, seq_lengths=(length, length))


def _sparse(mask_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """Number of blocks of keys for each block of queries, and their indices, the other ones after them."""
    counts = mask_BNN.sum(2, dtype=torch.int32)
    order = mask_BNN.to(torch.int8).argsort(dim=2, descending=True, stable=True).to(torch.int32)
    return counts[:, None].contiguous(), order[:, None].contiguous()
