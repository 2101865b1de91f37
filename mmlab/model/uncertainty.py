"""Weights of a diffusion loss that are learned, one for each noise level (EDM2, arXiv 2312.02696). Legend: B images."""

import math

import torch
from torch import Tensor, nn

from mmlab.model.config import NoiseUncertaintyConfig

HIGHEST = 2.0
"""Bound of the noise levels that are told apart; at 2, σ/α is 3,000."""
CYCLES = 4.0
"""Highest frequency of the features, per unit of the noise level."""


class NoiseUncertainty(nn.Module):
    """u, the logarithm of the loss that is to be expected at a noise level, and the loss L/e^u + u.

    The latter is least where e^u is the mean of L (arXiv 1705.07115), so that all levels have the same share of the
    gradients. u is linear in Fourier features of ln(σ/α)/4, which is EDM's c_noise; unlike EDM2's, their frequencies
    are not random, but evenly spaced. It starts at 0, with the loss as it is.

    Args:
        config: settings.
    """

    def __init__(self, config: NoiseUncertaintyConfig):
        super().__init__()
        self.settings = config
        self.weight = nn.Parameter(torch.zeros(config.features))

    def forward(self, losses_B: Tensor, snr_B: Tensor) -> Tensor:
        """L/e^u + u of each sample, float32 `[B]`.

        Args:
            losses_B: L.
            snr_B: signal-to-noise ratios α²/σ² of the samples, in 0 … infinity.
        """
        u_B = self.log_loss(snr_B)
        return losses_B.float() * (-u_B).exp() + u_B

    def log_loss(self, snr_B: Tensor) -> Tensor:
        """u, float32 `[B]`."""
        level_B = (-snr_B.log() / 8).clamp(-HIGHEST, HIGHEST).float()
        frequencies = torch.linspace(0, CYCLES, len(self.weight), device=level_B.device)
        features_BF = math.sqrt(2) * torch.cos(2 * math.pi * (level_B + HIGHEST)[:, None] * frequencies)
        return (features_BF * self.weight.float()).sum(1)
