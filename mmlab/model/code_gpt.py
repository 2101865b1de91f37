"""A transformer over the codes of images, row by row (Taming Transformers, arXiv 2012.09841, section 3.2).

Legend: B images, P tokens of the condition, N codes, T tokens, K codes of the book, D width, h heads, d width of a
head, R = d/2 rotations.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.model.config import CodeGPTConfig

BASE = 10_000.0
"""Base of the rotary frequencies."""


class Cache:
    """Keys and values of earlier tokens, per block, for the next code to attend to.

    Attributes:
        length: number of tokens.
        visible: bool `[B, P]`, which tokens of the condition are attended to; None: all.
    """

    def __init__(self) -> None:
        self.length = 0
        self.visible: Tensor | None = None
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, block: int, key_BhTd: Tensor, value_BhTd: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """Add the new tokens' keys and values of a block, and return those of all tokens.

        Args:
            block: its number.
            key_BhTd, value_BhTd: of the new tokens.
            room: the largest number of tokens.
        """
        if block not in self._blocks:
            batch, heads, _, width = key_BhTd.shape
            self._blocks[block] = (
                key_BhTd.new_empty(batch, heads, room, width),
                value_BhTd.new_empty(batch, heads, room, width),
            )
        end = self.length + key_BhTd.shape[2]
        keys, values = self._blocks[block]
        keys[:, :, self.length : end] = key_BhTd
        values[:, :, self.length : end] = value_BhTd
        return keys[:, :, :end], values[:, :, :end]


class CodeGPT(nn.Module):
    """Logits of each code, given the condition's context and vector and the earlier codes.

    The context's tokens come first, then the vector's, or a learned start token for a condition without a vector.
    Blocks are GPT-2's, with norms in front.

    Args:
        config: settings. Rotary positions are two-dimensional: half of a head's width rotates by row, half by column.
        codes: K.
        vector_width: width of the condition's vector, None for a condition without one.
        context_width: width of the condition's context, likewise.
        context_length: tokens of the context; None: one for each code, at the same positions.

    Raises:
        ConfigError: a width that is not a multiple of the heads, or of 4 times the heads with rotary positions.
    """

    forward_methods = ("read", "extend", "logits")

    def __init__(
        self,
        config: CodeGPTConfig,
        codes: int,
        vector_width: int | None = None,
        context_width: int | None = None,
        context_length: int | None = None,
    ):
        super().__init__()
        side, width, heads, dropout = config.side, config.width, config.heads, config.dropout
        if width % heads:
            raise ConfigError(f"model.prior.width={width} must be a multiple of heads={heads}.")
        if config.positions == "rotary" and width // heads % 4:
            raise ConfigError(
                f"model.prior.positions=rotary needs heads of a width divisible by 4, not {width // heads}."
            )
        self.codes, self.side, self.width, self.heads = codes, side, width, heads
        self.vector_width, self.context_width = vector_width, context_width
        self.aligned = context_width is not None and context_length is None
        tokens = 0 if context_width is None else context_length or side * side
        self.prefix = tokens + 1
        self.room = self.prefix + side * side - 1  # the last code is never an input
        self.embed = nn.Embedding(codes, width)
        self.context = None if context_width is None else nn.Linear(context_width, width)
        self.vector = None if vector_width is None else nn.Linear(vector_width, width)
        self.start = nn.Parameter(torch.zeros(width)) if vector_width is None else None
        self.positions = nn.Parameter(torch.zeros(self.room, width)) if config.positions == "learned" else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([Block(width, heads, dropout) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, codes, bias=False)
        self._initialize()

    def forward(self, codes_BN: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Return logits `[B, N, K]`; those of code n depend on the condition and the codes before it.

        Args:
            codes_BN: int64, the first N codes of images in raster order; the last one is not used.
            condition: of a conditioner.
        """
        return self.logits(self.read(codes_BN[:, :-1], condition))

    def read(self, codes_BN: Tensor, condition: dict[str, Tensor], cache: Cache | None = None) -> Tensor:
        """Return hidden states `[B, N + 1, D]`, after the condition and after each code.

        Args:
            codes_BN: int64, from no codes up to all but the last.
            condition: of a conditioner.
            cache: an empty one, to be filled for `extend`.
        """
        prefix_BPD = self._prefix(condition, len(codes_BN))
        x_BTD = torch.cat([prefix_BPD, self.embed(codes_BN).to(prefix_BPD.dtype)], 1)
        visible = condition.get("mask")
        if visible is not None:
            visible = F.pad(visible.bool(), (0, self.prefix - visible.shape[1]), value=True)
        if cache is not None:
            cache.visible = visible
        seen = None if visible is None else _causal(visible, x_BTD.shape[1])
        return self._through(x_BTD, 0, seen, cache)[:, self.prefix - 1 :]

    def extend(self, codes_B: Tensor, cache: Cache) -> Tensor:
        """Return hidden states `[B, D]` after one more code.

        Args:
            codes_B: int64.
            cache: of the earlier tokens; the code is added to it.
        """
        seen = None
        if cache.visible is not None:
            ahead = cache.length + 1 - self.prefix
            seen = F.pad(cache.visible, (0, ahead), value=True)[:, None, None]
        return self._through(self.embed(codes_B)[:, None], cache.length, seen, cache)[:, 0]

    def logits(self, hidden_BND: Tensor) -> Tensor:
        """Return logits of the next code, `[…, K]`."""
        return self.head(self.norm(hidden_BND))

    def _prefix(self, condition: dict[str, Tensor], count: int) -> Tensor:
        if self.vector is not None:
            last = self.vector(condition["vector"].to(self.vector.weight.dtype))[:, None]
        else:
            assert self.start is not None
            last = self.start.expand(count, 1, -1)
        if self.context is None:
            return last
        context = self.context(condition["context"].to(self.context.weight.dtype))
        return torch.cat([context, last.to(context.dtype)], 1)

    def _through(self, x_BTD: Tensor, start: int, seen: Tensor | None, cache: Cache | None) -> Tensor:
        """Run the blocks for tokens `start` … `start` + T - 1 of the sequence."""
        end = start + x_BTD.shape[1]
        angles = None
        if self.positions is not None:
            x_BTD = x_BTD + self.positions[start:end]
        else:
            angles = self._angles(x_BTD.device)[start:end]
        x_BTD = self.dropout(x_BTD)
        for number, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, angles, seen, None if cache is None else (cache, number, self.room))
        if cache is not None:
            cache.length = end
        return x_BTD

    def _angles(self, device: torch.device) -> Tensor:
        """Return the angles of all tokens, float32 `[T, R]`, which are 0 without a position in the image."""
        places = torch.arange(self.side * self.side, device=device)
        grid = torch.stack([places // self.side, places % self.side], 1).float()
        front = self.prefix - 1
        before = grid if self.aligned else grid.new_zeros(front, 2)
        along = torch.cat([before, grid.new_zeros(1, 2), grid])[: self.room]
        quarter = self.width // self.heads // 4
        rates = BASE ** -(torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
        return (along[:, :, None] * rates).flatten(1)

    def _initialize(self) -> None:
        """Initialize as GPT-2: standard deviation 0.02, less at the ends of residual branches."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.start_small(len(self.blocks))
        for parameter in (self.start, self.positions):
            if parameter is not None:
                nn.init.normal_(parameter, std=0.02)


class Block(nn.Module):
    """Causal self-attention and an MLP, each after a layer norm.

    Args:
        width: D.
        heads: attention heads.
        dropout: of attention and of both residual branches.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BTD: Tensor,
        angles_TR: Tensor | None,
        seen: Tensor | None,
        cached: tuple[Cache, int, int] | None,
    ) -> Tensor:
        """Add attention and MLP.

        Args:
            x_BTD: the new tokens.
            angles_TR: their angles; None without rotary positions.
            seen: bool `[B, 1, T, …]`, what each new token attends to; None: itself and all earlier tokens.
            cached: the cache, this block's number in it, and its room.
        """
        hidden = self.norm(x_BTD)
        parts = (self.query(hidden), self.key(hidden), self.value(hidden))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if angles_TR is not None:
            query, key = rotated(query, angles_TR), rotated(key, angles_TR)
        if cached is not None:
            cache, number, room = cached
            key, value = cache.extend(number, key, value, room)
        dropout = self.dropout.p if self.training else 0.0
        causal = seen is None and query.shape[2] > 1
        attended = F.scaled_dot_product_attention(query, key, value, seen, dropout, causal)
        x_BTD = x_BTD + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD)))

    def start_small(self, depth: int) -> None:
        """Scale the ends of the residual branches, so that 2 · depth of them add up to the variance of one."""
        for layer in (self.out, self.mlp[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * depth))


def rotated(x_BhTd: Tensor, angles_TR: Tensor) -> Tensor:
    """Rotate each pair (dimension r, dimension r + R) of a head by its angle."""
    first, second = x_BhTd.float().chunk(2, -1)
    cos, sin = angles_TR.cos(), angles_TR.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x_BhTd.dtype)


def _causal(visible_BP: Tensor, tokens: int) -> Tensor:
    """Return the attention mask, bool `[B, 1, T, T]`. A hidden token attends to itself: a row may not be empty."""
    visible = F.pad(visible_BP, (0, tokens - visible_BP.shape[1]), value=True)
    before = torch.ones(tokens, tokens, dtype=torch.bool, device=visible.device).tril()
    return ((visible[:, None] & before) | torch.eye(tokens, dtype=torch.bool, device=visible.device))[:, None]
