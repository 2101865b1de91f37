"""First stages with random weights for pictures of 16 pixels: f 4, latents of 4x4."""

from typing import Any

import torch
from torch import Tensor

from mmlab.model.autoencoder import KLAutoencoder, VQAutoencoder
from mmlab.model.config import KLAutoencoderConfig, VectorQuantizerConfig, VQAutoencoderConfig
from mmlab.model.quantizer import VectorQuantizer

SIZES: dict[str, Any] = {"block_out_channels": [8, 8, 16], "layers_per_block": 1, "norm_num_groups": 4}


def kl(**fields: Any) -> KLAutoencoder:
    torch.manual_seed(0)
    return KLAutoencoder(KLAutoencoderConfig(init="random", architecture={**SIZES, "latent_channels": 3, **fields}))


def vq(architecture: dict[str, Any] | None = None, **codebook: Any) -> VQAutoencoder:
    torch.manual_seed(0)
    book = VectorQuantizer(VectorQuantizerConfig(**{"codes": 16, "width": 4, **codebook}))
    return VQAutoencoder(VQAutoencoderConfig(architecture={**SIZES, **(architecture or {})}), book)


def pictures(count: int = 2, size: int = 16, seed: int = 0) -> Tensor:
    """Pixels in [-1, 1] `[count, 3, size, size]`."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
