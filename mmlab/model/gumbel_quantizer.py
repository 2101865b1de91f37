"""A codebook that is drawn from by Gumbel softmax. Legend: B pictures, D width, h/w sides of latents, K codes."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlab.model.quantizer import Quantized, Quantizer


class GumbelQuantizer(Quantizer):
    """Each latent vector draws its code from a distribution that a linear layer makes of it (dVAE, arXiv 2102.12092,
    section 2.1; VQGAN's f8 model of 8,192 codes).

    In training the drawn code is used, and the gradient goes through the softmax of logits and Gumbel noise over the
    temperature; else the likeliest code is. The loss is the KL divergence of the distribution from the uniform one.
    The noise is from torch's own state, which checkpoints keep.

    Args:
        codes: K.
        width: D.
        kl_weight: of the divergence, which is a mean over places with the stage's `reduction: mean`.
        temperature: of the softmax in the first step.
        last_temperature: after `anneal_steps`, along a cosine; None keeps the first one.
        anneal_steps: optimizer steps from the first to the last.
    """

    temperature: Tensor

    def __init__(
        self,
        codes: int,
        width: int,
        kl_weight: float = 5e-4,
        temperature: float = 1.0,
        last_temperature: float | None = None,
        anneal_steps: int = 150_000,
    ):
        super().__init__()
        self.codes, self.width, self.kl_weight = codes, width, kl_weight
        self.first, self.last, self.anneal_steps = temperature, last_temperature, anneal_steps
        self.logits = nn.Conv2d(width, codes, 1)
        self.codebook = nn.Parameter(torch.randn(codes, width))
        # In checkpoints: a run that goes on has the temperature that it had.
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def book(self) -> Tensor:
        return self.codebook.float()

    @torch.no_grad()
    def indices(self, z_BDhw: Tensor) -> Tensor:
        return self._logits(z_BDhw).argmax(1)

    def forward(self, z_BDhw: Tensor) -> Quantized:
        logits_BKhw = self._logits(z_BDhw)
        if self.training and torch.is_grad_enabled():
            noise = -torch.empty_like(logits_BKhw).exponential_().log()
            soft_BKhw = ((logits_BKhw + noise) / self.temperature).softmax(1)
        else:
            soft_BKhw = logits_BKhw.softmax(1)
        indices_Bhw = soft_BKhw.argmax(1)
        hard_BKhw = F.one_hot(indices_Bhw, self.codes).permute(0, 3, 1, 2).to(soft_BKhw)
        chosen_BKhw = hard_BKhw + soft_BKhw - soft_BKhw.detach()
        # Half precision would round the codes, which decoders are given unrounded otherwise.
        with torch.autocast(z_BDhw.device.type, enabled=False):
            values = torch.einsum("bkhw,kd->bdhw", chosen_BKhw, self.book())
        log_q = logits_BKhw.log_softmax(1)
        kl_B = (log_q.exp() * (log_q + math.log(self.codes))).sum((1, 2, 3))
        # The stage divides by all of a picture's latent values, D at each place.
        return Quantized(values, indices_Bhw, self.kl_weight * self.width * kl_B, self.codes)

    def after_step(self, step: int) -> None:
        """Lower the temperature; `step` optimizer steps are done."""
        if self.last is not None:
            way = (1 - math.cos(math.pi * min(1.0, step / self.anneal_steps))) / 2
            self.temperature.fill_(self.first + way * (self.last - self.first))

    def _logits(self, z_BDhw: Tensor) -> Tensor:
        """float32 `[B, K, h, w]`."""
        # Half precision would take the wrong one of two codes that are about as likely.
        with torch.autocast(z_BDhw.device.type, enabled=False):
            return F.conv2d(z_BDhw.float(), self.logits.weight.float(), _float(self.logits.bias))


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
