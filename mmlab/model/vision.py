"""Vision encoders. Legend: N images, P tokens per image, D width, H/W pixels."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig

from mmlab.config.errors import ConfigError
from mmlab.model.config import VisionEncoderConfig
from mmlab.model.exact_buffers import ExactBuffers
from mmlab.model.preprocessing import FILE, normalized, pixels_of, read_preprocessor, statistics, three_numbers
from mmlab.model.pretrained import (
    build_model,
    load_pretrained,
    load_weights,
    on_meta,
    read_config,
    read_tensors,
    require_source,
)
from mmlab.model.vision_layout import inputs_of, layers_of, layout_of, native_size, tokens_of
from mmlab.runs.disk import to_json
from mmlab.weights import fill


@runtime_checkable
class ImageEncoder(Protocol):
    """What a model needs of its part `vision`: an `nn.Module` with these attributes.

    A class of your own package that has them is named in YAML, `_target_: mylab.vision.Encoder`, after
    `MMLAB_ALLOW_TARGETS=mylab`; the other keys of the page are its keyword arguments. Its constructor draws random
    weights and reads none, because `mmlab plan` calls it on the meta device. The module normalizes pixels on its own.
    While it is frozen it is in eval mode, and an image's features must not depend on the other images of a batch.

    It may have more, each for itself, see `mmlab.training.artifacts`, `filling` and `trainable`:

    - `load_pretrained()` fills it with weights of its own; without it, and without a run in `stage.init_from` that
      trained it, its weights count as random, and the run saves them.
    - `save(folder)`, `load(folder)` and `describe()`, all three: a format of its own. Otherwise its state dict is
      written as `model.safetensors`. `describe` returns plain values that a connector depends on beside the weights.
    - `unused()` yields weights that no feature depends on; they are never trained.

    A model that transformers can hold, too (for export), is a subclass of `PreTrainedModel` that your module registers
    when it is imported (`AutoConfig.register`, `AutoModel.register`), in a subclass of `VisionEncoder`, which finds
    everything above: `_target_: mylab.vision.Encoder` with `class Encoder(VisionEncoder)` in that module, and the keys
    of `VisionEncoderConfig`. `forward(pixel_values, **options)` of the model returns tokens or a feature map as
    `last_hidden_state`; to be exported it needs tokens, also as the last of its `hidden_states`, and their width as
    `hidden_size` of its config.
    """

    @property
    def image_size(self) -> int:
        """Height and width of the pixels."""
        ...

    @property
    def tokens_per_image(self) -> int:
        """P."""
        ...

    @property
    def width(self) -> int:
        """D."""
        ...

    def __call__(self, pixels_N3HW: Tensor) -> Tensor:
        """Encode uint8 pixels `[N, 3, H, W]` as features `[N, P, D]`, the positions of a grid row by row."""
        ...


def require_encoder(vision: Any) -> None:
    """Raise ConfigError if a part `vision` lacks what an `ImageEncoder` has."""
    names = ("image_size", "tokens_per_image", "width")
    lacks = [f"{name}, a whole number" for name in names if not isinstance(getattr(vision, name, None), int)]
    if not isinstance(vision, nn.Module):
        lacks = ["parameters: it is no torch.nn.Module"]
    if lacks:
        raise ConfigError(
            f"model.vision: {type(vision).__name__} is not a vision encoder, because it has no {lacks[0]}; "
            "mmlab.model.vision.ImageEncoder states what one has."
        )


class VisionEncoder(ExactBuffers):
    """A vision tower of transformers, read at its hidden layer `feature_layer`.

    LLaVA reads the layer before the last one (section 4.1, "before and after the last Transformer layer"; table 8 of
    the paper). The layers after it are kept, because the tower is saved as a whole, but they are neither run nor
    trained: running them would cost a tower of 4 layers 37 % of its time, one of 24 layers 6 %. A tower whose layers
    differ in resolution (Swin, ConvNeXt, EfficientNet) is read at its last feature map.

    Attributes:
        tower: the transformers model, without the layers that are not run.
        feature_layer: index into the hidden states; -1 for the last feature map.
        prefix: number of tokens before the grid (class token, registers), which are left out.
        keep_class: the first of them is not left out.
        image_mean, image_std: statistics of values in [0, 1] by which pixels are normalized.
        image_size: height and width in pixels.
        tokens_per_image: P.
        width: D.

    Args:
        config: settings.

    Raises:
        ConfigError: a tower that gives neither tokens nor a feature map of an image, or has no such feature layer.
    """

    forward_methods = ("patches",)

    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionEncoderConfig):
        super().__init__()
        self.settings = config
        whole = read_config(config, "vision")
        self.config: PretrainedConfig = getattr(whole, "vision_config", whole)
        # Of the tower's weights in a checkpoint with more parts; none in one of only the vision encoder.
        self._stored_prefix = "" if whole is self.config else "vision_model."
        read = config.init == "pretrained" and not (on_meta() and config.architecture)
        self._preprocessor = read_preprocessor(require_source(config, "vision")) if read else {}
        mean, std = statistics(self._preprocessor)
        self.image_mean = three_numbers("image_mean", config.image_mean or mean)
        self.image_std = three_numbers("image_std", config.image_std or std)
        native = native_size(self.config) if config.image_size is None else config.image_size
        self.image_size: int = native or pixels_of(self._preprocessor) or 224
        self.tower: Any = self._build()
        self._layers_name = layers_of(self.tower, self.image_size)
        self.feature_layer, used = self._feature_layer()
        self.unused_layers = nn.ModuleList(self._layers[used:])
        del self._layers[used:]
        layout = layout_of(self.tower, self._read_at, self.image_size)
        self.prefix, self.width, self._unused = layout.prefix, layout.width, layout.unused
        self.keep_class = config.features == "cls_patch"
        if self.keep_class and not self.prefix:
            raise ConfigError(
                f"model.vision.features={config.features} is not available for {self.config.model_type}; use patch."
            )
        self.tokens_per_image = layout.positions + int(self.keep_class)
        # Non-persistent: they belong to the config, and they must follow the module to its device.
        self.register_buffer("mean", torch.tensor(self.image_mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(self.image_std).view(3, 1, 1) * 255, persistent=False)

    def _build(self) -> Any:
        """The tower, by transformers' AutoModel; some towers of larger models are not known to it, such as BLIP-2's."""
        kind, name = self.config.model_type, type(self.config).__name__.removesuffix("Config") + "Model"
        self._by_auto = type(self.config) in MODEL_MAPPING
        try:
            if self._by_auto:
                return build_model(AutoModel, self.config, self.settings)
            if not hasattr(transformers, name):
                raise ConfigError(f"model.vision: transformers has no model of type '{kind}' for images alone.")
            return getattr(transformers, name)._from_config(self.config, dtype=torch.float32)
        except (ImportError, ValueError, TypeError) as error:  # such as a library that is not installed
            line = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")
            raise ConfigError(f"model.vision: '{kind}' cannot be built, because {line}.") from error

    def _feature_layer(self) -> tuple[int, int | None]:
        """Return (the layer that is read, the number of layers that are run); without layers of one shape, None."""
        layer = self.settings.feature_layer
        if self._layers_name is None:
            if layer not in (None, -1):
                raise ConfigError(
                    f"model.vision.feature_layer={layer}, but {self.config.model_type} has no layers of one width and "
                    "resolution; set it to null, which reads the last feature map."
                )
            return -1, None
        depth, layer = len(self._layers), -2 if layer is None else layer
        if not -depth - 1 <= layer <= depth:
            raise ConfigError(f"model.vision.feature_layer={layer}, but the tower has {depth} layers.")
        if layer % (depth + 1) == 0:
            raise ConfigError("model.vision.feature_layer=0 has no transformer layer to read; use 1 or more, or -1.")
        return layer, layer % (depth + 1)

    @property
    def _layers(self) -> nn.ModuleList:
        """The tower's transformer layers, without the unused ones; none of a tower with stages."""
        return nn.ModuleList() if self._layers_name is None else self.tower.get_submodule(self._layers_name)

    @property
    def _read_at(self) -> nn.Module | None:
        return None if self._layers_name is None else self._layers[-1]

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        """Encode uint8 pixels `[N, 3, H, W]`, which are normalized here, on the device: features `[N, P, D]`."""
        pixels = self.normalize(pixels_N3HW)
        hidden = tokens_of(self.tower, self._read_at, inputs_of(self.tower, pixels), len(pixels))
        return torch.cat([hidden[:, :1], hidden[:, self.prefix :]], 1) if self.keep_class else hidden[:, self.prefix :]

    def patches(self, pixels_N3HW: Tensor) -> Tensor:
        """As `forward`, but without class token, and if the last layer is read, after the tower's norm behind it."""
        pixels = self.normalize(pixels_N3HW)
        layer = self._read_at if self.unused_layers else None
        return tokens_of(self.tower, layer, inputs_of(self.tower, pixels), len(pixels))[:, self.prefix :]

    def normalize(self, pixels_N3HW: Tensor) -> Tensor:
        """Return what the tower reads of uint8 pixels, in its dtype."""
        return normalized(pixels_N3HW, self.mean, self.std, next(self.tower.parameters()).dtype)

    def unused(self) -> Iterator[nn.Parameter]:
        """Yield the weights that no feature depends on: layers after `feature_layer`, what the tower has after its
        layers (a norm, a pooling head), and the token that DINOv2 puts in place of masked patches."""
        yield from self.unused_layers.parameters()
        for name, weight in self.tower.named_parameters():
            if re.sub(r"\.(base_layer|lora_\w+\.\w+)(?=\.)", "", name) in self._unused:
                yield weight

    def save(self, folder: Path) -> None:
        """Write the whole tower, unused layers included, as a transformers folder."""
        with self.whole_tower():
            self.tower.save_pretrained(folder)
        if self._preprocessor and not (self.settings.image_mean and self.settings.image_std):
            (folder / FILE).write_text(to_json(self._preprocessor, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Fill the whole tower from a transformers folder; raises ConfigError when it does not fit."""
        with self.whole_tower():
            load_weights(self.tower, folder)

    def load_pretrained(self) -> None:
        """Fill the whole tower from the source of the settings; raises ConfigError when it does not fit."""
        with self.whole_tower():
            if self._by_auto:
                load_pretrained(self.tower, self.settings, "vision")
            elif self.settings.init == "pretrained":
                source, prefix = require_source(self.settings, "vision"), self._stored_prefix
                tensors = read_tensors(source, (prefix,), "vision")
                fill(self.tower, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, source)

    def describe(self) -> dict[str, Any]:
        """Return what a connector that was trained with this encoder depends on, apart from its weights."""
        size = {} if self.settings.image_size is None else {"image_size": self.image_size}
        return {"feature_layer": self.feature_layer, "class_token": self.keep_class, **size}

    @contextmanager
    def whole_tower(self) -> Iterator[None]:
        """Put the unused layers back into the tower meanwhile: checkpoints have all of its layers."""
        used = len(self._layers)
        self._layers.extend(self.unused_layers)
        try:
            yield
        finally:
            del self._layers[used:]
