"""Packed rows without a mask of all pairs: attention runs on each piece of a row by itself.

transformers hands a `BlockMask` through to the attention function as it is, so what says where the pieces lie is one.
Legend: B rows, T tokens, H heads, D width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmlab.model.packed_rows import additive, visible


@dataclass(frozen=True)
class Block:
    """Tokens of a row that attend to no token outside: a text, or a picture and the questions about it.

    Attributes:
        start, end: its columns.
        first: end of the tokens of the first segment, which see nothing but each other; the others need a mask.
        padding: it has no tokens.
    """

    start: int
    end: int
    first: int
    padding: bool


class Layout:
    """Where the segments of packed rows lie, read on the host: reading a device's tensors would synchronize.

    Args:
        segment_ids_BT, context_ids_BT: on the CPU, see `packed_rows.visible`.

    Attributes:
        blocks: of each row; they cover it.
        lengths: of the runs of equal segment numbers, row by row; they cover all rows.
        shares: whether a segment attends to another one.
    """

    def __init__(self, segment_ids_BT: Tensor, context_ids_BT: Tensor):
        rows, length = segment_ids_BT.shape
        place = torch.arange(length).expand(rows, -1)
        start = torch.full((rows, int(segment_ids_BT.max()) + 1), length)
        start = start.scatter_reduce(1, segment_ids_BT, place, "amin")
        earliest = start.gather(1, segment_ids_BT)
        known = context_ids_BT * (context_ids_BT < start.shape[1])  # of other contexts nothing is in the rows
        earliest = torch.where(known > 0, earliest.minimum(start.gather(1, known)), earliest)
        begins = torch.ones_like(place, dtype=torch.bool)
        begins[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
        earliest = torch.where(segment_ids_BT > 0, earliest, (place * begins).cummax(1).values)
        closed = earliest.flip(1).cummin(1).values.flip(1) == place  # nothing from here on sees what is before
        self.blocks: list[list[Block]] = []
        self.lengths: list[int] = []
        for row in range(rows):
            runs = [*begins[row].nonzero()[:, 0].tolist(), length]
            self.lengths += [after - before for before, after in pairwise(runs)]
            edges = [*closed[row].nonzero()[:, 0].tolist(), length]
            empty = (segment_ids_BT[row] == 0).tolist()
            self.blocks.append(
                [Block(a, b, min(next(run for run in runs if run > a), b), empty[a]) for a, b in pairwise(edges)]
            )
        self.shares = bool((context_ids_BT > 0).any())


class _Rows(BlockMask):
    """What transformers takes for a block mask, with the shape of one."""

    size: torch.Size
    ndim = 4

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.size


class BlockRows(_Rows):
    """Attention within `Block`s, each by itself: on a CPU every product is then as small as it can be.

    Args:
        layout: of the rows.
        segment_ids_BT, context_ids_BT, position_ids_BT: see `packed_rows.masks`.
        window: of the layer; None: no window.
        dtype: of the scores.
    """

    def __init__(
        self,
        layout: Layout,
        segment_ids_BT: Tensor,
        context_ids_BT: Tensor,
        position_ids_BT: Tensor,
        window: int | None,
        dtype: torch.dtype,
    ):
        rows, length = segment_ids_BT.shape
        self.size = torch.Size((rows, 1, length, length))
        self.rows: list[list[_Plan]] = [[] for _ in range(rows)]
        for row, block in ((row, block) for row, blocks in enumerate(layout.blocks) for block in blocks):
            width = block.end - block.start
            near = window if window is not None and width > window else None
            plain = 0 if near else block.first - block.start
            mask = None
            if not block.padding and plain < width:
                part = row, slice(block.start, block.end)
                seen = visible(segment_ids_BT[part][None], context_ids_BT[part][None])
                if near is not None:
                    places = position_ids_BT[part]
                    seen &= places[:, None] - places[None, :] < near
                mask = additive(seen[:, plain:], dtype)
            self.rows[row].append(_Plan(block, plain, mask))

    @torch.compiler.disable  # its numbers, different for each batch, would be compiled into the layer
    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Return `[B, T, H, D]` of queries, keys and values `[B, heads, T, D]`."""
        rows = []
        for row, plans in enumerate(self.rows):
            sizes = [plan.block.end - plan.block.start for plan in plans]
            # Slices would each have a gradient as large as the whole.
            parts = zip(*(x[row : row + 1].split(sizes, 2) for x in (query, key, value)), strict=True)
            blocks = [_attend_in(module, plan, q, k, v, options) for plan, (q, k, v) in zip(plans, parts, strict=True)]
            rows.append(torch.cat(blocks, 1))
        return torch.cat(rows)


@dataclass(frozen=True)
class _Plan:
    """A block, how many of its tokens come first and need no mask, and the mask `[1, 1, others, all]` of the others."""

    block: Block
    plain: int
    mask: Tensor | None


def _attend_in(module: Any, plan: _Plan, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    if plan.block.padding:
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    parts = []
    if plan.plain:
        front = [x[:, :, : plan.plain] for x in (query, key, value)]
        parts.append(sdpa_attention_forward(module, front[0], front[1], front[2], None, is_causal=True, **options)[0])
    if plan.mask is not None:
        mask = plan.mask.to(query.dtype)
        parts.append(sdpa_attention_forward(module, query[:, :, plan.plain :], key, value, mask, **options)[0])
    return torch.cat(parts, 1)


class VarlenRows(_Rows):
    """Attention within segments by flash kernels for texts of different length; padding is a text, too.

    Args:
        layout: of rows without shared contexts.
        shape: B and T.
        device: of the rows.
        window: of the layer; None: no window.
    """

    def __init__(self, layout: Layout, shape: Sequence[int], device: torch.device, window: int | None):
        self.size = torch.Size((shape[0], 1, shape[1], shape[1]))
        ends = torch.tensor([0, *layout.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.ends = ends.to(device, non_blocking=True)
        self.longest = max(layout.lengths)
        self.window = (-1 if window is None else window - 1, 0)

    @torch.compiler.disable  # its numbers, different for each batch, would be compiled into the layer
    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Return `[B, T, H, D]` of queries, keys and values `[B, heads, T, D]`."""
        rows, heads, length, _ = query.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (query, key, value))
        ends, longest = self.ends, self.longest
        settings: Any = {"scale": options.get("scaling"), "window_size": self.window}
        out: Any = varlen_attn(q, k, v, ends, ends, longest, longest, enable_gqa=k.shape[1] < heads, **settings)
        return out.unflatten(0, (rows, length))
