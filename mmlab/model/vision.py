"""Vision encoders. Legend: N images, P tokens per image, D width, H/W pixels."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Blip2VisionModel, PretrainedConfig

from mmlab.config.errors import ConfigError
from mmlab.model.config import VisionEncoderConfig
from mmlab.model.pretrained import build_model, load_pretrained, load_weights, read_config, read_tensors, require_source
from mmlab.weights import fill

# Tokens before the grid (class token, registers), by transformers model_type.
PREFIX_TOKENS = {
    "clip_vision_model": lambda config: 1,
    "siglip_vision_model": lambda config: 0,
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + config.num_register_tokens,
    "blip_2_vision_model": lambda config: 1,
}


class VisionEncoder(nn.Module):
    """A CLIP, SigLIP, DINOv2 or BLIP-2 vision tower of transformers, read at its hidden layer `feature_layer`.

    LLaVA reads the layer before the last one (section 4.1, "before and after the last Transformer layer"; table 8 of
    the paper). The layers after it are kept, because the tower is saved as a whole, but they are neither run nor
    trained: running them would cost a tower of 4 layers 37 % of its time, one of 24 layers 6 %.

    Args:
        config: settings.

    Raises:
        ConfigError: unknown architecture, or a feature layer that the tower does not have.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionEncoderConfig):
        super().__init__()
        self.settings = config
        whole = read_config(config, "vision")
        self.config: PretrainedConfig = getattr(whole, "vision_config", whole)
        kind = self.config.model_type
        if kind not in PREFIX_TOKENS:
            raise ConfigError(f"model.vision: '{kind}' is not supported; use one of {', '.join(PREFIX_TOKENS)}.")
        self.prefix = PREFIX_TOKENS[kind](self.config)
        self.keep_class = config.features == "cls_patch"
        if self.keep_class and not self.prefix:
            raise ConfigError(f"model.vision.features={config.features} is not available for {kind}; use patch.")
        # Of the tower's weights in a BLIP-2 checkpoint; none in one of only the vision encoder.
        self._stored_prefix = "" if whole is self.config else "vision_model."
        # transformers' AutoModel does not know the vision encoder of BLIP-2.
        self.tower: Any = (
            Blip2VisionModel._from_config(self.config, dtype=torch.float32)
            if kind == "blip_2_vision_model"
            else build_model(AutoModel, self.config, config)
        )
        depth = self.config.num_hidden_layers
        if not -depth - 1 <= config.feature_layer <= depth:
            raise ConfigError(f"model.vision.feature_layer={config.feature_layer}, but the tower has {depth} layers.")
        last = config.feature_layer % (depth + 1)
        if last == 0:
            raise ConfigError("model.vision.feature_layer=0 has no transformer layer to read; use 1 or more, or -1.")
        lists = ((name, m) for name, m in self.tower.named_modules() if isinstance(m, nn.ModuleList))
        self._layers_name = next(name for name, layers in lists if len(layers) == depth)
        self.unused_layers = nn.ModuleList(self._layers[last:])
        del self._layers[last:]
        # Non-persistent: they belong to the config, and they must follow the module to its device.
        self.register_buffer("mean", torch.tensor(list(config.image_mean)).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(list(config.image_std)).view(3, 1, 1) * 255, persistent=False)

    @property
    def _layers(self) -> nn.ModuleList:
        """The tower's transformer layers, without the unused ones."""
        return self.tower.get_submodule(self._layers_name)

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def tokens_per_image(self) -> int:
        grid = (self.config.image_size // self.config.patch_size) ** 2
        return grid + int(self.keep_class)

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        """Encode uint8 pixels `[N, 3, H, W]`, which are normalized here, on the device: features `[N, P, D]`."""
        dtype = next(self.tower.parameters()).dtype
        pixels = ((pixels_N3HW - self.mean) / self.std).to(dtype)
        outputs: list[Any] = []
        # A hook reads the layer's own output: towers differ in which norm they apply after the last layer.
        handle = self._layers[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            self.tower(pixel_values=pixels)
        finally:
            handle.remove()
        hidden = outputs[-1][0] if isinstance(outputs[-1], tuple) else outputs[-1]
        return torch.cat([hidden[:, :1], hidden[:, self.prefix :]], 1) if self.keep_class else hidden[:, self.prefix :]

    def unused(self) -> Iterator[nn.Parameter]:
        """Yield the weights that no feature depends on: layers after `feature_layer`, what the tower has after its
        layers (a norm, a pooling head), and the token that DINOv2 puts in place of masked patches."""
        yield from self.unused_layers.parameters()
        run = set(self._layers.parameters())
        weights = list(self.tower.named_parameters())  # in the order in which the tower uses them
        last = max(i for i, (_, weight) in enumerate(weights) if weight in run)
        yield from (weight for i, (name, weight) in enumerate(weights) if i > last or name.endswith("mask_token"))

    def save(self, folder: Path) -> None:
        """Write the whole tower, unused layers included, as a transformers folder."""
        with self._whole_tower():
            self.tower.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Fill the whole tower from a transformers folder; raises ConfigError when it does not fit."""
        with self._whole_tower():
            load_weights(self.tower, folder)

    def load_pretrained(self) -> None:
        """Fill the whole tower from the source of the settings; raises ConfigError when it does not fit."""
        with self._whole_tower():
            if self.config.model_type != "blip_2_vision_model":
                load_pretrained(self.tower, self.settings, "vision")
            elif self.settings.init == "pretrained":
                source, prefix = require_source(self.settings, "vision"), self._stored_prefix
                tensors = read_tensors(source, (prefix,), "vision")
                fill(self.tower, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, source)

    def describe(self) -> dict[str, Any]:
        """Return what a connector that was trained with this encoder depends on, apart from its weights."""
        return {"feature_layer": self.settings.feature_layer, "class_token": self.keep_class}

    @contextmanager
    def _whole_tower(self) -> Iterator[None]:
        """Put the unused layers back into the tower meanwhile: checkpoints have all of its layers."""
        used = len(self._layers)
        self._layers.extend(self.unused_layers)
        try:
            yield
        finally:
            del self._layers[used:]
