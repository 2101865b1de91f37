"""Vector quantization. Legend: B pictures, D width of a code, h/w sides of latents, K codes, N vectors."""

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

DISTANCES = 1 << 25
"""Distances that are held at a time: 128 MiB of float32."""


@dataclass(frozen=True)
class Quantized:
    """Latents replaced by codes.

    Attributes:
        values: float32 `[B, D, h, w]`, the codes; their gradient passes straight through to the latents.
        indices: int64 `[B, h, w]`.
        loss: float32 `[B]`, codebook + β · commitment term, summed over a picture's latent values.
        codes: K.
    """

    values: Tensor
    indices: Tensor
    loss: Tensor
    codes: int


class Quantizer(nn.Module, ABC):
    """What all codebooks share.

    Attributes:
        codes: K.
        width: D.
        normalize: whether latents and codes have length 1.
    """

    codes: int
    width: int
    normalize: bool = False

    def project(self, z_BDhw: Tensor) -> Tensor:
        """Latents where codes live: of length 1 over D with `normalize`; float32."""
        return F.normalize(z_BDhw.float(), dim=1) if self.normalize else z_BDhw.float()

    @abstractmethod
    def book(self) -> Tensor:
        """The codes' vectors, float32 `[K, D]`."""

    @abstractmethod
    def indices(self, z_BDhw: Tensor) -> Tensor:
        """The codes of latents, int64 `[B, h, w]`."""

    def vectors(self, indices_Bhw: Tensor) -> Tensor:
        """The vectors of codes, float32 `[B, D, h, w]`."""
        return F.embedding(indices_Bhw, self.book()).permute(0, 3, 1, 2)

    def after_step(self, step: int) -> None:
        """Called after each optimizer step with the number of steps done, on all ranks."""


class VectorQuantizer(Quantizer):
    """Each latent vector becomes its nearest code (van den Oord et al. 2017, equation 3).

    The loss is ‖sg[z] − e‖² + β ‖z − sg[e]‖², β on the commitment term as in the paper. With `normalize`, latents and
    codes are compared on the unit sphere (ViT-VQGAN, section 3.2), and the loss and the decoder see them there.

    Args:
        codes: K.
        width: D.
        beta: weight of the commitment term.
        normalize: whether latents and codes have length 1.
        revive_after: every so many optimizer steps, codes that no latent has used since the last time become
            latents of the current batch, distinct ones; None leaves dead codes alone.
        ema: share that a code keeps of its old place at each step, while it follows the mean of the latents that use
            it (van den Oord et al. 2017, appendix A.1); the codebook then has no gradient, and the loss only its
            commitment term. None: the codebook learns by gradient.
        legacy: β on the codebook term and 1 on the commitment, as VQGAN's and latent diffusion's released models were
            trained: to go on with one of them.

    Raises:
        ConfigError: an `ema` that never moves, or `legacy` with it, which leaves no codebook term.
    """

    uses: Tensor
    ema_uses: Tensor
    ema_sums: Tensor

    def __init__(
        self,
        codes: int,
        width: int,
        beta: float = 0.25,
        normalize: bool = True,
        revive_after: int | None = None,
        ema: float | None = None,
        legacy: bool = False,
    ):
        super().__init__()
        if legacy and ema is not None:
            raise ConfigError(
                "quantizer.legacy weights the codebook term, which quantizer.ema leaves out; take one of them."
            )
        if ema is not None and not 0 <= ema < 1:
            raise ConfigError(f"quantizer.ema={ema:g} must be at least 0 and below 1; 0.99 is usual.")
        self.codes, self.width, self.beta, self.normalize = codes, width, beta, normalize
        self.revive_after, self.ema, self.legacy = revive_after, ema, legacy
        # Unit vectors in all directions, or VQGAN's start close to 0.
        start = torch.randn(codes, width) if normalize else torch.empty(codes, width).uniform_(-1 / codes, 1 / codes)
        start = F.normalize(start) if normalize else start
        if ema is None:
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
            self.register_buffer("ema_uses", torch.ones(codes))
            self.register_buffer("ema_sums", start.clone())
        # Over all ranks, so that rank 0's checkpoint speaks for all.
        self.register_buffer("uses", torch.zeros(codes, dtype=torch.int64))
        # Of the current step alone: checkpoints lie between steps, and DDP would overwrite a buffer.
        self._counts: Tensor | None = None
        self._sums: Tensor | None = None
        self._latents: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A step of 1 % is lost in bfloat16.
        averages = () if self.ema is None else ("codebook", "ema_uses", "ema_sums")
        return cast_all_but(self, averages, partial(super()._apply, fn, recurse))

    def book(self) -> Tensor:
        """The codes as latents are compared with them, float32 `[K, D]`."""
        return F.normalize(self.codebook.float(), dim=1) if self.normalize else self.codebook.float()

    @torch.no_grad()
    def indices(self, z_BDhw: Tensor) -> Tensor:
        """The codes of latents, int64 `[B, h, w]`."""
        return self._nearest(self.project(z_BDhw), self.book())

    def forward(self, z_BDhw: Tensor) -> Quantized:
        z_BDhw = self.project(z_BDhw)
        book_KD = self.book()
        indices_Bhw = self._nearest(z_BDhw.detach(), book_KD.detach())
        e_BDhw = F.embedding(indices_Bhw, book_KD).permute(0, 3, 1, 2)
        codebook = (e_BDhw - z_BDhw.detach()).square().sum((1, 2, 3))
        commitment = (z_BDhw - e_BDhw.detach()).square().sum((1, 2, 3))
        if self.training and torch.is_grad_enabled() and (self.revive_after is not None or self.ema is not None):
            self._note(z_BDhw.detach(), indices_Bhw)
        straight = z_BDhw + (e_BDhw - z_BDhw).detach()
        loss = self.beta * codebook + commitment if self.legacy else codebook + self.beta * commitment
        if self.ema is not None:
            loss = self.beta * commitment
        return Quantized(straight, indices_Bhw, loss, self.codes)

    def _nearest(self, z_BDhw: Tensor, book_KD: Tensor) -> Tensor:
        """int64 `[B, h, w]`: the nearest code of each vector."""
        batch, _, height, width = z_BDhw.shape
        flat_ND = z_BDhw.permute(0, 2, 3, 1).reshape(-1, self.width)
        # Half precision would take the wrong one of two codes that lie close.
        with torch.autocast(flat_ND.device.type, enabled=False):
            length_K = book_KD.square().sum(1)
            chunks = flat_ND.split(max(1, DISTANCES // self.codes))
            found = [(length_K - 2 * chunk @ book_KD.T).argmin(1) for chunk in chunks]
        return torch.cat(found).view(batch, height, width)

    def _note(self, z_BDhw: Tensor, indices_Bhw: Tensor) -> None:
        counts = indices_Bhw.flatten().bincount(minlength=self.codes)
        self._counts = counts if self._counts is None else self._counts + counts
        self._latents = z_BDhw.permute(0, 2, 3, 1).reshape(-1, self.width)
        if self.ema is not None:
            sums = torch.zeros_like(self.ema_sums).index_add_(0, indices_Bhw.flatten(), self._latents)
            self._sums = sums if self._sums is None else self._sums + sums

    def after_step(self, step: int) -> None:
        """Count the step's codes over all ranks, move them, and revive the dead ones when it is time.

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
        if self.revive_after is not None and step % self.revive_after == 0:
            self._revive(step)
            self.uses.zero_()

    @torch.no_grad()
    def _follow(self, counts_K: Tensor) -> None:
        """Move the codes towards the means of the latents that used them; one that none used keeps its place."""
        if self.ema is None:
            return
        assert self._sums is not None
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        self.ema_uses.lerp_(counts_K.to(self.ema_uses), 1 - self.ema)
        self.ema_sums.lerp_(self._sums, 1 - self.ema)
        self._sums = None
        moved = self.ema_sums / self.ema_uses.clamp(min=1e-5)[:, None]
        used = (counts_K > 0)[:, None]
        self.codebook.copy_(torch.where(used, moved, self.codebook))

    @torch.no_grad()
    def _revive(self, step: int) -> None:
        assert self._latents is not None
        # A plain background gives the same vector many times, and of equal codes only one is ever used.
        fresh = self._latents.unique(dim=0)
        dead = (self.uses == 0).nonzero().flatten()[: len(fresh)]
        order = torch.randperm(len(fresh), generator=torch.Generator().manual_seed(step))[: len(dead)]
        self.codebook[dead] = fresh[order.to(fresh.device)].to(self.codebook)
        changed = [self.codebook.data]
        if self.ema is not None:
            self.ema_uses[dead], self.ema_sums[dead] = 1.0, self.codebook[dead]
            changed += [self.ema_uses, self.ema_sums]
        if dist.is_initialized():
            # Ranks may have different numbers of distinct latents, so which codes were revived is rank 0's, too.
            for value in changed:
                dist.broadcast(value, 0)


def cast_all_but(module: nn.Module, names: Iterable[str], cast: Callable[[], Any]) -> nn.Module:
    """Move and cast a module by `cast`; the named buffers move, and keep the dtype and values that they had."""
    kept = {name: getattr(module, name) for name in names}
    cast()
    for name, value in kept.items():
        moved = getattr(module, name)
        if moved.dtype != value.dtype:
            setattr(module, name, value.to(moved.device))
    return module


def usage(counts_K: Tensor) -> tuple[float, float]:
    """(share of codes that are used at all, perplexity: how many equally used codes would be as uncertain).

    Args:
        counts_K: how often each code was used.
    """
    share_K = counts_K.double() / counts_K.sum().clamp(min=1)
    return (counts_K > 0).double().mean().item(), torch.special.entr(share_K).sum().exp().item()
