"""Vector quantization. Legend: B images, D width of a code, h/w sides of latents, K codes, N vectors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.model.config import VectorQuantizerConfig
from mmlab.weights import set_rows, whole

DISTANCES = 1 << 25
"""Distances in memory at a time: 128 MiB of float32."""


@dataclass(frozen=True)
class Quantized:
    """Latents replaced by codes.

    Attributes:
        values: float32 `[B, D, h, w]`, the codes' vectors; their gradient passes straight through to the latents.
        indices: int64 `[B, h, w]`.
        loss: float32 `[B]`, codebook + β · commitment term, summed over an image's latent values.
        codes: K.
    """

    values: Tensor
    indices: Tensor
    loss: Tensor
    codes: int


class Quantizer(nn.Module, ABC):
    """Base of codebooks.

    Attributes:
        config: settings.
        codes: K.
        width: D.
        normalize: whether latents and codes have length 1.
        nearest: whether `indices` are the vectors of `book` that are nearest to the latents.
    """

    forward_methods = ("indices", "vectors", "book")

    config: Any
    codes: int
    width: int
    normalize: bool = False
    nearest: bool = False

    def project(self, z_BDhw: Tensor) -> Tensor:
        """Project latents to where the codes lie: to length 1 over D with `normalize`; float32."""
        return F.normalize(z_BDhw.float(), dim=1) if self.normalize else z_BDhw.float()

    @abstractmethod
    def book(self) -> Tensor:
        """Return the codes' vectors, float32 `[K, D]`."""

    @abstractmethod
    def indices(self, z_BDhw: Tensor) -> Tensor:
        """Return the codes of latents, int64 `[B, h, w]`."""

    def vectors(self, indices_Bhw: Tensor) -> Tensor:
        """Return the vectors of codes, float32 `[B, D, h, w]`."""
        return F.embedding(indices_Bhw, self.book()).permute(0, 3, 1, 2)

    def after_step(self, step: int) -> None:
        """Called after each optimizer step with the number of steps done, on all ranks."""

    def describe(self) -> dict[str, Any]:
        """Return what must be equal for stored weights to mean the same here."""
        return {"codes": self.codes, "width": self.width, "normalize": self.normalize}


class VectorQuantizer(Quantizer):
    """Each latent vector becomes its nearest code (van den Oord et al. 2017, equation 3).

    The loss is ‖sg[z] − e‖² + β ‖z − sg[e]‖², β on the commitment term as in the paper. With `normalize`, latents and
    codes are compared on the unit sphere (ViT-VQGAN, section 3.2), and the loss and the decoder see them there.

    Args:
        config: settings. With `revive_after`, dead codes become distinct latents of the current batch. With `ema`,
            codes follow the mean of the latents that use them (van den Oord et al. 2017, appendix A.1); the codebook
            then has no gradient, and the loss only its commitment term. `legacy` puts β on the codebook term and 1 on
            the commitment, to continue the released models of VQGAN and latent diffusion.

    Raises:
        ConfigError: `legacy` with `ema`, which leaves no codebook term.
    """

    nearest = True
    uses: Tensor
    ema_uses: Tensor
    ema_sums: Tensor

    def __init__(self, config: VectorQuantizerConfig):
        super().__init__()
        if config.legacy and config.ema is not None:
            raise ConfigError(
                "quantizer.legacy weights the codebook term, which quantizer.ema leaves out; set only one of them."
            )
        self.config, self.codes, self.width, self.normalize = config, config.codes, config.width, config.normalize
        codes, width = config.codes, config.width
        if config.normalize:
            start = F.normalize(torch.randn(codes, width))  # in all directions
        else:
            start = torch.empty(codes, width).uniform_(-1 / codes, 1 / codes)  # close to 0, as in VQGAN
        if config.ema is None:
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
            self.register_buffer("ema_uses", torch.ones(codes))
            self.register_buffer("ema_sums", start.clone())
        # Summed over all ranks: checkpoints are rank 0's.
        self.register_buffer("uses", torch.zeros(codes, dtype=torch.int64))
        # Only of the current step, not buffers: checkpoints lie between steps, and DDP would overwrite buffers.
        self._counts: Tensor | None = None
        self._sums: Tensor | None = None
        self._latents: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # An update of 1 % is lost in bfloat16.
        averages = () if self.config.ema is None else ("codebook", "ema_uses", "ema_sums")
        return cast_all_but(self, averages, partial(super()._apply, fn, recurse))

    def book(self) -> Tensor:
        """Return the codes as latents are compared with them, float32 `[K, D]`."""
        return F.normalize(self.codebook.float(), dim=1) if self.normalize else self.codebook.float()

    @torch.no_grad()
    def indices(self, z_BDhw: Tensor) -> Tensor:
        """Return the codes of latents, int64 `[B, h, w]`."""
        return self._nearest(self.project(z_BDhw), self.book())

    def forward(self, z_BDhw: Tensor) -> Quantized:
        z_BDhw = self.project(z_BDhw)
        book_KD = self.book()
        indices_Bhw = self._nearest(z_BDhw.detach(), book_KD.detach())
        e_BDhw = F.embedding(indices_Bhw, book_KD).permute(0, 3, 1, 2)
        codebook = (e_BDhw - z_BDhw.detach()).square().sum((1, 2, 3))
        commitment = (z_BDhw - e_BDhw.detach()).square().sum((1, 2, 3))
        config = self.config
        if self.training and torch.is_grad_enabled() and (config.revive_after is not None or config.ema is not None):
            self._note(z_BDhw.detach(), indices_Bhw)
        straight = z_BDhw + (e_BDhw - z_BDhw).detach()
        if config.ema is not None:
            loss = config.beta * commitment
        elif config.legacy:
            loss = config.beta * codebook + commitment
        else:
            loss = codebook + config.beta * commitment
        return Quantized(straight, indices_Bhw, loss, self.codes)

    def _nearest(self, z_BDhw: Tensor, book_KD: Tensor) -> Tensor:
        """Return the nearest code of each vector, int64 `[B, h, w]`."""
        batch, _, height, width = z_BDhw.shape
        flat_ND = z_BDhw.permute(0, 2, 3, 1).reshape(-1, self.width)
        # Half precision would choose the wrong one of two close codes.
        with torch.autocast(flat_ND.device.type, enabled=False):
            length_K = book_KD.square().sum(1)
            chunks = flat_ND.split(max(1, DISTANCES // self.codes))
            nearest = [(length_K - 2 * chunk @ book_KD.T).argmin(1) for chunk in chunks]
        return torch.cat(nearest).view(batch, height, width)

    def _note(self, z_BDhw: Tensor, indices_Bhw: Tensor) -> None:
        counts = indices_Bhw.flatten().bincount(minlength=self.codes)
        self._counts = counts if self._counts is None else self._counts + counts
        self._latents = z_BDhw.permute(0, 2, 3, 1).reshape(-1, self.width)
        if self.config.ema is not None:
            sums = torch.zeros_like(self.ema_sums).index_add_(0, indices_Bhw.flatten(), self._latents)
            self._sums = sums if self._sums is None else self._sums + sums

    def after_step(self, step: int) -> None:
        """Count the step's codes over all ranks, move them, and revive dead ones every `revive_after` steps.

        Args:
            step: optimizer steps done.
        """
        if self._counts is None:
            return
        if dist.is_initialized():
            dist.all_reduce(self._counts)
        self._follow(self._counts)
        self.uses += self._counts
        self._counts = None
        if self.config.revive_after is not None and step % self.config.revive_after == 0:
            self._revive(step)
            self.uses.zero_()

    @torch.no_grad()
    def _follow(self, counts_K: Tensor) -> None:
        """Move the codes towards the means of the latents that used them; unused codes stay."""
        if self.config.ema is None:
            return
        assert self._sums is not None
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        self.ema_uses.lerp_(counts_K.to(self.ema_uses), 1 - self.config.ema)
        self.ema_sums.lerp_(self._sums, 1 - self.config.ema)
        self._sums = None
        moved = self.ema_sums / self.ema_uses.clamp(min=1e-5)[:, None]
        used = (counts_K > 0)[:, None]
        self.codebook.copy_(torch.where(used, moved, self.codebook))

    @torch.no_grad()
    def _revive(self, step: int) -> None:
        assert self._latents is not None
        # A plain background gives many equal vectors, and only one of equal codes is ever used.
        fresh = self._latents.unique(dim=0)
        dead = (self.uses == 0).nonzero().flatten()[: len(fresh)]
        order = torch.randperm(len(fresh), generator=torch.Generator().manual_seed(step))[: len(dead)]
        codebook = whole(self.codebook.data)
        codebook[dead] = fresh[order.to(fresh.device)].to(codebook)
        changed = [codebook]
        if self.config.ema is not None:
            self.ema_uses[dead], self.ema_sums[dead] = 1.0, codebook[dead]
            changed += [self.ema_uses, self.ema_sums]
        if dist.is_initialized():
            # Ranks may have different numbers of distinct latents; rank 0 decides which codes are revived.
            for value in changed:
                dist.broadcast(value, 0)
        set_rows(self.codebook.data, codebook)


def cast_all_but(module: nn.Module, names: Iterable[str], cast: Callable[[], Any]) -> nn.Module:
    """Move and cast a module by `cast`; the named buffers are moved, but keep their dtype and values."""
    before = {name: getattr(module, name) for name in names}
    cast()
    for name, value in before.items():
        moved = getattr(module, name)
        if moved.dtype != value.dtype:
            setattr(module, name, value.to(moved.device))
    return module


def usage(counts_K: Tensor) -> tuple[float, float]:
    """Return (share of codes in use, perplexity: how many equally used codes have the same entropy).

    Args:
        counts_K: how often each code was used.
    """
    share_K = counts_K.double() / counts_K.sum().clamp(min=1)
    return (counts_K > 0).double().mean().item(), torch.special.entr(share_K).sum().exp().item()
