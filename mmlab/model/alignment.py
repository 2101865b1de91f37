"""Alignment of a denoiser's hidden tokens with the features of a vision encoder (REPA, arXiv 2410.06940).

Legend: B images, N hidden tokens, D their width, P patches of the encoder, E their width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.model.config import AlignmentConfig
from mmlab.model.preprocessing import resized
from mmlab.model.vision import VisionEncoder, require_encoder


class Alignment(nn.Module):
    """The projector from hidden tokens to features, and the similarity of both (section 3.3 of the paper).

    Args:
        config: settings.
        denoiser: its `aligned_layer(depth)` returns the layer whose output is aligned, and D.
        vision: an `ImageEncoder`.

    Raises:
        ConfigError: no encoder or one without a grid of patches, or a denoiser without such a layer.
    """

    def __init__(self, config: AlignmentConfig, denoiser: Any, vision: Any):
        super().__init__()
        self.settings = config
        if vision is None:
            raise ConfigError("model/alignment needs the vision encoder whose features it takes; choose model/vision=…")
        require_encoder(vision)
        count = vision.tokens_per_image - int(getattr(vision, "keep_class", False))
        if count < 2 or isqrt(count) ** 2 != count:
            raise ConfigError(
                f"model.alignment compares patches on a square grid, and model.vision gives {count} features of an "
                "image; choose another encoder."
            )
        if not hasattr(denoiser, "aligned_layer"):
            raise ConfigError(
                "model.alignment takes hidden tokens of a UNet or a DiT; the method `aligned_layer`, which gives them, "
                f"is missing in {type(denoiser).__name__}."
            )
        hidden, width = denoiser.aligned_layer(config.depth)[1], config.width
        layers = (nn.Linear(hidden, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.projector = nn.Sequential(*layers, nn.Linear(width, vision.width))

    def forward(self, hidden: Tensor, features_BPE: Tensor, grid: tuple[int, int]) -> Tensor:
        """Cosine similarity of projected tokens and features, the mean over an image's tokens: float32 `[B]`.

        Args:
            hidden: tokens `[B, N, D]`, or a map `[B, D, rows, columns]`.
            features_BPE: of the same images, on a square grid.
            grid: rows and columns of the hidden tokens, N = rows · columns.
        """
        hidden_BND = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
        # In half precision, the norms may overflow.
        return F.cosine_similarity(self.projector(hidden_BND).float(), on_grid(features_BPE, grid), dim=-1).mean(1)

    @contextmanager
    def hidden_of(self, denoiser: Any) -> Iterator[list[Tensor]]:
        """Give a list that each call of the denoiser meanwhile adds its hidden tokens or map to."""
        kept: list[Tensor] = []
        layer, _ = denoiser.aligned_layer(self.settings.depth)
        handle = layer.register_forward_hook(lambda module, args, output: kept.append(output))
        try:
            yield kept
        finally:
            handle.remove()


@torch.no_grad()
def features_of(vision: Any, pixels_B3HW: Tensor) -> Tensor:
    """Features of the patches of clean images, `[B, P, E]`, without class token.

    The images are resized to the encoder's size, which normalizes them by its own statistics.

    Args:
        vision: an `ImageEncoder` in eval mode. A `VisionEncoder` that reads its last layer is read after its own last
            norm, as the paper reads DINOv2.
        pixels_B3HW: uint8.
    """
    pixels = resized(pixels_B3HW, vision.image_size)
    return vision.patches(pixels) if isinstance(vision, VisionEncoder) else vision(pixels)


def on_grid(features_BPE: Tensor, grid: tuple[int, int]) -> Tensor:
    """Features of a square grid on another one, float32 `[B, N, E]`: bilinear, averaged where that is coarser."""
    side = isqrt(features_BPE.shape[1])
    features = features_BPE.float()
    if (side, side) == grid:
        return features
    maps = features.transpose(1, 2).unflatten(2, (side, side))
    return F.interpolate(maps, size=grid, mode="bilinear", antialias=True, align_corners=False).flatten(2).mT
