"""Two vision encoders side by side. Legend: N images, P tokens per image, D width, H/W pixels."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmlab.config.errors import ConfigError
from mmlab.model.checkpoint_files import SAFETENSORS
from mmlab.model.preprocessing import resized
from mmlab.model.vision import require_encoder
from mmlab.weights import fill


class FusedVisionEncoder(nn.Module):
    """The features of two encoders, concatenated at each position (Prismatic VLMs, section 4.2: DINOv2 and SigLIP).

    Each encoder normalizes pixels with its own statistics. Images have the larger of the two sizes, and are resized for
    the other encoder.

    Args:
        first: an `ImageEncoder`.
        second: another one, with as many tokens per image.

    Raises:
        ConfigError: the numbers of tokens differ.
    """

    def __init__(self, first: Any, second: Any):
        super().__init__()
        for encoder in (first, second):
            require_encoder(encoder)
        self.first, self.second = first, second
        counts = [encoder.tokens_per_image for encoder in (first, second)]
        if counts[0] != counts[1]:
            raise ConfigError(
                f"model.vision.first gives {counts[0]} tokens for {first.image_size} px, and model.vision.second "
                f"{counts[1]} for {second.image_size} px; set the image_size of one so that both give as many."
            )
        self.image_size = max(first.image_size, second.image_size)
        self.tokens_per_image = counts[0]
        self.width = first.width + second.width

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        """Encode uint8 pixels `[N, 3, H, W]`: features `[N, P, D]`, those of the first encoder in front."""
        features = [encoder(resized(pixels_N3HW, encoder.image_size)) for encoder in self._encoders.values()]
        return torch.cat(features, -1)

    @property
    def _encoders(self) -> dict[str, Any]:
        return {"first": self.first, "second": self.second}

    def save(self, folder: Path) -> None:
        """Write each encoder in its own format into `first/` and `second/`."""
        for name, encoder in self._encoders.items():
            (folder / name).mkdir()
            if hasattr(encoder, "save"):
                encoder.save(folder / name)
            else:
                weights = {key: value.contiguous() for key, value in encoder.state_dict().items()}
                save_file(weights, folder / name / SAFETENSORS)

    def load(self, folder: Path) -> None:
        """Fill both encoders; raises ConfigError when a folder does not fit."""
        for name, encoder in self._encoders.items():
            if not (folder / name).is_dir():
                raise ConfigError(f"{folder} does not fit the model: it has no {name}/, so it is not of two encoders.")
            if hasattr(encoder, "load"):
                encoder.load(folder / name)
            else:
                fill(encoder, load_file(folder / name / SAFETENSORS), folder / name)

    def describe(self) -> dict[str, Any]:
        """Return what a connector that was trained with these encoders depends on, apart from their weights."""
        return {
            f"{name}.{key}": value
            for name, encoder in self._encoders.items()
            if hasattr(encoder, "describe")
            for key, value in encoder.describe().items()
        }
