"""A codebook with Gumbel softmax. Legend: B images, D width, h/w sides of latents, K codes."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlab.model.config import GumbelQuantizerConfig
from mmlab.model.quantizer import Quantized, Quantizer


class GumbelQuantizer(Quantizer):
    """Each latent vector draws its code from a distribution that a linear layer computes (dVAE, arXiv 2102.12092,
    section 2.1; VQGAN's f8 model of 8,192 codes).

    In training the drawn code is used, and the gradient goes through the softmax of logits and Gumbel noise over the
    temperature; otherwise the likeliest code is used. The loss is the KL divergence of the distribution from the
    uniform one. The noise comes from torch's global generator, whose state checkpoints save.

    Args:
        config: settings.
    """

    temperature: Tensor

    def __init__(self, config: GumbelQuantizerConfig):
        super().__init__()
        self.config, self.codes, self.width = config, config.codes, config.width
        codes, width = config.codes, config.width
        self.logits = nn.Conv2d(width, codes, 1)
        self.codebook = nn.Parameter(torch.randn(codes, width))
        # A buffer, so that a resumed run has the temperature of its checkpoint.
        self.register_buffer("temperature", torch.tensor(float(config.temperature)))

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
        # Half precision would round the codes.
        with torch.autocast(z_BDhw.device.type, enabled=False):
            values = torch.einsum("bkhw,kd->bdhw", chosen_BKhw, self.book())
        log_q = logits_BKhw.log_softmax(1)
        kl_B = (log_q.exp() * (log_q + math.log(self.codes))).sum((1, 2, 3))
        # The stage divides by all of an image's latent values, D at each position.
        return Quantized(values, indices_Bhw, self.config.kl_weight * self.width * kl_B, self.codes)

    def after_step(self, step: int) -> None:
        """Lower the temperature; `step` optimizer steps are done."""
        first, last = self.config.temperature, self.config.last_temperature
        if last is not None:
            progress = (1 - math.cos(math.pi * min(1.0, step / self.config.anneal_steps))) / 2
            self.temperature.fill_(first + progress * (last - first))

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "quantizer": type(self).__name__}

    def _logits(self, z_BDhw: Tensor) -> Tensor:
        """Return float32 logits `[B, K, h, w]`."""
        # Half precision would choose the wrong one of two codes of about the same likelihood.
        with torch.autocast(z_BDhw.device.type, enabled=False):
            return F.conv2d(z_BDhw.float(), self.logits.weight.float(), _float(self.logits.bias))


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
