"""The diffusion transformer with adaLN-Zero blocks (DiT, arXiv 2212.09748), written from the paper.

Legend: B images, C channels, H/W rows and columns of latents, h/w rows and columns of patches, N = h·w patches,
T tokens of a context, D width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.model.config import DiTConfig
from mmlab.model.diffusers_dit import read_dit
from mmlab.weights import fill

FREQUENCIES = 256
"""Width of the sinusoidal time embedding (DiT, appendix A)."""


class DiT(nn.Module):
    """A transformer over patches of noisy latents whose layer norms depend on time and condition.

    The vector of a condition is added to the time embedding (through a linear layer where it is not of width D); all
    blocks attend to its context (as in PixArt-α, arXiv 2310.00426, section 2.3). Positions are sines and cosines of row
    and column, so any height and width divisible by the patch can be denoised.

    Args:
        config: settings.
        channels: C of the latents.
        vector_width: width of the condition's vector, None for a condition without one.
        context_width: width of the condition's context, likewise.

    Raises:
        ConfigError: a width that is not a multiple of 4 and of the heads; a source and another condition than classes.
    """

    def __init__(
        self, config: DiTConfig, channels: int, vector_width: int | None = None, context_width: int | None = None
    ):
        super().__init__()
        self.settings = config
        width, heads, patch = config.width, config.heads, config.patch
        if width % heads or width % 4:
            raise ConfigError(f"model.denoiser.width={width} must be a multiple of 4 and of heads={heads}.")
        if config.source is not None and (context_width is not None or vector_width is None):
            raise ConfigError(
                f"model.denoiser.source={config.source} is conditioned on classes alone; set model/conditioner=class."
            )
        self.channels, self.vector_width, self.context_width = channels, vector_width, context_width
        self.patch, self.heads, self.width = patch, heads, width
        self.embed = nn.Linear(patch * patch * channels, width)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.vector = nn.Linear(vector_width, width) if vector_width not in (None, width) else nn.Identity()
        self.reduction = patch
        self.blocks = nn.ModuleList([Block(width, heads, context_width) for _ in range(config.depth)])
        self.final = FinalLayer(width, patch * patch * channels)
        self._initialize()

    def forward(self, x_BCHW: Tensor, time_B: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Predict the process's target, `[B, C, H, W]` in the weights' dtype.

        Raises:
            ConfigError: latents whose sides the patch does not divide.
        """
        height, width = x_BCHW.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ConfigError(f"model.denoiser.patch={self.patch} does not divide latents of {height} x {width}.")
        h, w, dtype = height // self.patch, width // self.patch, self.embed.weight.dtype
        positions_ND = position_embedding(h, w, self.width, x_BCHW.device)
        x_BND = self.embed(patches(x_BCHW.to(dtype), self.patch)) + positions_ND.to(dtype)
        # The angles are float32: in bfloat16 the times 993 … 1000 are equal.
        cond_BD = self.time(time_embedding(time_B, FREQUENCIES).to(dtype))
        if self.vector_width is not None:
            cond_BD = cond_BD + self.vector(condition["vector"].to(dtype))
        context = condition["context"].to(dtype) if self.context_width is not None else None
        for block in self.blocks:
            x_BND = block(x_BND, cond_BD, context, condition.get("mask"))
        return pixels(self.final(x_BND, cond_BD), h, w, self.patch)

    def aligned_layer(self, depth: int | None) -> tuple[nn.Module, int]:
        """The block whose output is aligned with a vision encoder's features, and D.

        Args:
            depth: of `AlignmentConfig`. By default 8 of 28 blocks, rounded up (REPA, arXiv 2410.06940, for DiT-XL).

        Raises:
            ConfigError: more blocks than there are.
        """
        count = len(self.blocks)
        chosen = -(-2 * count // 7) if depth is None else depth
        if chosen > count:
            raise ConfigError(f"model.alignment.depth={depth}, but the denoiser has {count} blocks.")
        return self.blocks[chosen - 1], self.width

    def load_pretrained(self) -> None:
        """Fill the DiT from the source of the settings, if any; raises ConfigError when it does not fit."""
        if self.settings.source is None:
            return
        here = {"channels": self.channels, "depth": len(self.blocks), "width": self.width, "heads": self.heads}
        weights = read_dit(self.settings.source, {**here, "patch": self.patch})
        own = {f"vector.{name}": value for name, value in self.vector.state_dict().items()}
        fill(self, {**weights, **own}, self.settings.source)

    def _initialize(self) -> None:
        """Initialize as ViT does, with zeros at the ends of blocks and of the model (sections 3.2 and 4)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.time.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):
                module.start_at_zero()


class Block(nn.Module):
    """Self-attention, cross-attention to a context, if any, and an MLP; a new block is the identity.

    Args:
        width: D.
        heads: attention heads.
        context_width: width of the context; None: no cross-attention.
    """

    def __init__(self, width: int, heads: int, context_width: int | None):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.cross = CrossAttention(width, heads, context_width) if context_width is not None else None
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x_BND: Tensor, cond_BD: Tensor, context_BTD: Tensor | None, mask_BT: Tensor | None) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(F.silu(cond_BD))[:, None].chunk(6, dim=-1)
        hidden = modulated(x_BND, shift, scale)
        x_BND = x_BND + gate * self.out(attend(self.query(hidden), self.key(hidden), self.value(hidden), self.heads))
        if self.cross is not None and context_BTD is not None:
            x_BND = x_BND + self.cross(x_BND, context_BTD, mask_BT)
        return x_BND + gate_mlp * self.mlp(modulated(x_BND, shift_mlp, scale_mlp))

    def start_at_zero(self) -> None:
        """Set all six modulations to 0 (adaLN-Zero), so that the block is the identity."""
        nn.init.zeros_(self.modulation.weight)
        if self.cross is not None:
            nn.init.zeros_(self.cross.out.weight)


class CrossAttention(nn.Module):
    """Attention from patches to the tokens of a context.

    Args:
        width: D.
        heads: attention heads.
        context_width: width of the context.
    """

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(context_width, width), nn.Linear(context_width, width)

    def forward(self, x_BND: Tensor, context_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        query, key, value = self.query(self.norm(x_BND)), self.key(context_BTD), self.value(context_BTD)
        return self.out(attend(query, key, value, self.heads, mask_BT))


class FinalLayer(nn.Module):
    """Adaptive layer norm and the linear layer from tokens to patches.

    Args:
        width: D.
        values: of a patch.
    """

    def __init__(self, width: int, values: int):
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, values)

    def forward(self, x_BND: Tensor, cond_BD: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(cond_BD))[:, None].chunk(2, dim=-1)
        return self.linear(modulated(x_BND, shift, scale))

    def start_at_zero(self) -> None:
        for layer in (self.modulation, self.linear):
            nn.init.zeros_(layer.weight)


def modulated(x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """Apply a layer norm with shift and scale from time and condition."""
    return F.layer_norm(x_BND, x_BND.shape[-1:], eps=1e-6) * (1 + scale_B1D) + shift_B1D


def attend(query_BND: Tensor, key_BTD: Tensor, value_BTD: Tensor, heads: int, mask_BT: Tensor | None = None) -> Tensor:
    """Return multi-head attention `[B, N, D]`; tokens where `mask_BT` is false are ignored."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query_BND, key_BTD, value_BTD))
    mask = None if mask_BT is None else mask_BT[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def patches(x_BCHW: Tensor, patch: int) -> Tensor:
    """Cut `[B, C, H, W]` into patches `[B, N, patch·patch·C]`, row by row; within a patch: row, column, channel."""
    batch, channels, height, width = x_BCHW.shape
    x = x_BCHW.view(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def pixels(x_BNP: Tensor, h: int, w: int, patch: int) -> Tensor:
    """Invert `patches` for a grid of h × w."""
    x = x_BNP.unflatten(2, (patch, patch, -1)).unflatten(1, (h, w))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def time_embedding(time_B: Tensor, width: int) -> Tensor:
    """Return cosines and sines of the time, float32 `[B, width]`, with periods from 2π to 2π·10⁴ (as DDPM's)."""
    half = width // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=time_B.device) / (half - 1))
    angles = time_B.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_embedding(h: int, w: int, width: int, device: torch.device | str) -> Tensor:
    """Return sines and cosines of each patch's column, then of its row, float32 `[N, width]`."""
    rates = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float32, device=device) / (width // 4))

    def along(count: int) -> Tensor:
        angles = torch.arange(count, dtype=torch.float32, device=device)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    columns = along(w)[None].expand(h, w, -1)
    rows = along(h)[:, None].expand(h, w, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)
