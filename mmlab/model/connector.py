"""Connectors: from the vision encoder's width to the language model's. Legend: N images, P tokens, V/D widths."""

import torch
from torch import Tensor, nn

from mmlab.model.config import MLPConnectorConfig


class LinearConnector(nn.Module):
    """One linear layer (LLaVA, section 4.1, the matrix W).

    Args:
        vision_width: V, width of the vision features.
        language_width: D, width of the language model.
    """

    def __init__(self, vision_width: int, language_width: int):
        super().__init__()
        self.proj = nn.Linear(vision_width, language_width)

    def forward(self, features_NPV: Tensor) -> Tensor:
        return self.proj(features_NPV)


class MLPConnector(nn.Module):
    """`depth` linear layers with GELU between them (LLaVA-1.5: depth 2, `mlp2x_gelu`).

    Args:
        config: settings.
        vision_width: V, width of the vision features.
        language_width: D, width of the language model and of the hidden layers.
    """

    def __init__(self, config: MLPConnectorConfig, vision_width: int, language_width: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(vision_width, language_width)]
        for _ in range(config.depth - 1):
            layers += [nn.GELU(), nn.Linear(language_width, language_width)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features_NPV: Tensor) -> Tensor:
        return self.layers(features_NPV)


class FusedMLPConnector(nn.Module):
    """Three linear layers with GELU between them, the first one to 4 V (Prismatic VLMs, `fused-gelu-mlp`).

    Args:
        vision_width: V, width of the features of two encoders.
        language_width: D, width of the language model.
    """

    def __init__(self, vision_width: int, language_width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(vision_width, 4 * vision_width),
            nn.GELU(),
            nn.Linear(4 * vision_width, language_width),
            nn.GELU(),
            nn.Linear(language_width, language_width),
        )

    def forward(self, features_NPV: Tensor) -> Tensor:
        return self.layers(features_NPV)


class Newline(nn.Module):
    """The learned feature at the end of each row of a picture's tiles (LLaVA-NeXT, `image_newline`).

    Args:
        language_width: D, width of the language model.
    """

    def __init__(self, language_width: int):
        super().__init__()
        self.feature = nn.Parameter(torch.randn(language_width) * language_width**-0.5)

    def forward(self) -> Tensor:
        """Return the feature `[D]`."""
        return self.feature.clone()  # with FSDP the gathered weight itself is gone after this call
