"""Vision encoders. Legend: N pictures, P tokens per picture, D width, H/W pixels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Blip2VisionModel, PretrainedConfig

from mmlab.config.errors import ConfigError
from mmlab.model.checkpoint import build_pretrained, load_weights, on_meta, read_config, read_tensors
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
    """A transformers vision tower whose hidden layer `feature_layer` is the picture's feature.

    LLaVA reads the layer before the last one (section 4.1, "before and after the last Transformer
    layer"; table 8 of the paper). Layers behind it are kept, so that the tower is saved whole, but not run, and never
    learn.

    Args:
        source: hub name or local folder of a CLIP, SigLIP, DINOv2 or BLIP-2 checkpoint.
        init: `pretrained`, or `random` to build `architecture` with random weights.
        architecture: transformers config fields (`model_type`, `hidden_size`, …) for random weights.
        feature_layer: index into the hidden states (0 = embeddings, -1 = after the last layer).
        features: `patch` drops the class token, `cls_patch` keeps it in front.
        image_mean, image_std: per channel, for pixels in [0, 1].

    Raises:
        ConfigError: unknown architecture, or a feature layer that the tower does not have.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        source: str | None = None,
        init: str = "pretrained",
        architecture: dict[str, Any] | None = None,
        feature_layer: int = -2,
        features: str = "patch",
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
    ):
        super().__init__()
        config = read_config(source, dict(architecture or {}), init, "vision")
        self.config: PretrainedConfig = getattr(config, "vision_config", config)
        if self.config.model_type not in PREFIX_TOKENS:
            raise ConfigError(
                f"model.vision: '{self.config.model_type}' is not supported; use one of {', '.join(PREFIX_TOKENS)}."
            )
        # Of a whole BLIP-2 checkpoint, the vision encoder alone.
        self.tower = _build_tower(self.config, source, init, "" if config is self.config else "vision_model.")
        self.prefix = PREFIX_TOKENS[self.config.model_type](self.config)
        if features not in ("patch", "cls_patch") or (features == "cls_patch" and not self.prefix):
            raise ConfigError(
                f"model.vision.features={features} is not available for {self.config.model_type}; use patch."
            )
        self.keep_class = features == "cls_patch"
        self.feature_layer = feature_layer
        layers = _layers(self.tower, self.config.num_hidden_layers)
        if not -len(layers) - 1 <= feature_layer <= len(layers):
            raise ConfigError(f"model.vision.feature_layer={feature_layer}, but the tower has {len(layers)} layers.")
        run = feature_layer % (len(layers) + 1)
        if run == 0:
            raise ConfigError("model.vision.feature_layer=0 has no transformer layer to read; use 1 or more, or -1.")
        self.unused_layers = nn.ModuleList(layers[run:])
        del layers[run:]
        # In a tuple, so that the list is not registered a second time.
        self._run_layers = (layers,)
        # Non-persistent: they belong to the config, and they must follow the module to its device.
        self.register_buffer("mean", torch.tensor(list(image_mean)).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(list(image_std)).view(3, 1, 1) * 255, persistent=False)

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
        """uint8 `[N, 3, H, W]` → features `[N, P, D]`; normalisation happens here, on the device."""
        dtype = next(self.tower.parameters()).dtype
        pixels = ((pixels_N3HW - self.mean) / self.std).to(dtype)
        captured: list[Tensor] = []
        # A hook reads the layer's own output: towers differ in which norm they apply behind the last layer.
        handle = self._run_layers[0][-1].register_forward_hook(lambda module, args, out: captured.append(_hidden(out)))
        try:
            self.tower(pixel_values=pixels)
        finally:
            handle.remove()
        hidden = captured[-1]
        return torch.cat([hidden[:, :1], hidden[:, self.prefix :]], 1) if self.keep_class else hidden[:, self.prefix :]

    def unused(self) -> Iterator[nn.Parameter]:
        """The weights that no feature depends on: layers behind `feature_layer`, what the tower has behind its layers
        (a norm, a pooling head), and the token that DINOv2 puts in place of masked patches."""
        yield from self.unused_layers.parameters()
        run = set(self._run_layers[0].parameters())
        weights = list(self.tower.named_parameters())  # in the order in which the tower uses them
        last = max(i for i, (_, weight) in enumerate(weights) if weight in run)
        yield from (weight for i, (name, weight) in enumerate(weights) if i > last or name.endswith("mask_token"))

    def save(self, folder: Path) -> None:
        """Write the whole tower, unused layers included, as a transformers folder."""
        with self._whole():
            self.tower.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Fill the whole tower from a transformers folder; raises ConfigError when it does not fit."""
        with self._whole():
            load_weights(self.tower, folder)

    def describe(self) -> dict[str, Any]:
        """What a connector that was trained beside this encoder depends on, apart from its weights."""
        return {"feature_layer": self.feature_layer, "class_token": self.keep_class}

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Put the unused layers back into the tower for a while."""
        (layers,) = self._run_layers
        run = len(layers)
        layers.extend(self.unused_layers)
        try:
            yield
        finally:
            del layers[run:]


def _build_tower(config: PretrainedConfig, source: str | None, init: str, prefix: str) -> Any:
    """The tower that `config` describes, with random weights or those whose names begin with `prefix`."""
    if config.model_type != "blip_2_vision_model":
        return build_pretrained(AutoModel, config, source, init, "vision")
    # transformers' AutoModel does not know the vision encoder of BLIP-2.
    tower: Any = Blip2VisionModel._from_config(config, dtype=torch.float32)
    if init == "pretrained" and not on_meta():
        assert source is not None, "read_config refuses a missing source"
        tensors = read_tensors(source, (prefix,), "vision")
        fill(tower, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, source)
    return tower


def _layers(tower: nn.Module, depth: int) -> nn.ModuleList:
    """The tower's list of transformer layers: the first one as long as its config says."""
    return next(m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
