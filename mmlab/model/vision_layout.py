"""What a vision tower of transformers gives for an image, found by running it on the meta device, without any memory.

Legend: N images, H/W pixels or positions, T tokens with those before the grid, D width.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel

from mmlab.config.errors import ConfigError

REFUSED = {
    "maskformer": "its tokens are the queries of a decoder",
    "vit_mae": "it encodes only a random quarter of the patches",
    "yolos": "its last tokens are detections, which belong to no patch",
}
"""Types whose tokens look like those of an image, and are not one for each patch, row by row."""
NAFLEX = "siglip2_vision_model"
"""SigLIP 2 for any aspect ratio, which takes patches, not pixels; its checkpoints of one size are of type siglip."""
IMAGES = 2
"""Images in a probe: Pixtral puts the tokens of all images in one row."""


@dataclass(frozen=True)
class Layout:
    """What a tower gives.

    Attributes:
        width: D.
        prefix: tokens before the grid: class token, registers.
        positions: tokens of the grid, row by row.
        unused: names of the tower's weights that no feature depends on.
    """

    width: int
    prefix: int
    positions: int
    unused: frozenset[str]


def square(size: Any, what: str) -> int | None:
    """Return the side of a square size: a number, or two equal ones; None for none.

    Raises:
        ConfigError: height and width differ.
    """
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) > 1:
        raise ConfigError(f"model.vision: {what} is {list(size)}, but images are square; give model.vision.image_size.")
    return next(iter(sides), None)


def native_size(config: PretrainedConfig) -> int | None:
    """Return the height and width in pixels that a tower's config states, or None."""
    if config.model_type == NAFLEX:
        return isqrt(config.num_patches) * config.patch_size
    return square(getattr(config, "image_size", None), "image_size")


def inputs_of(tower: PreTrainedModel, pixels_N3HW: Tensor) -> dict[str, Any]:
    """Return the arguments of a tower's `forward` for normalized square pixels."""
    if tower.config.model_type == NAFLEX:
        return _patches(pixels_N3HW, tower.config.patch_size)
    native = getattr(tower.config, "image_size", None)
    sides = native if isinstance(native, list | tuple) else [native]
    # Towers with this argument take another size only with it; others, such as DINOv2, interpolate in any case.
    if native and {*sides} != {pixels_N3HW.shape[-1]} and "interpolate_pos_encoding" in _parameters(tower):
        return {"pixel_values": pixels_N3HW, "interpolate_pos_encoding": True}
    return {"pixel_values": pixels_N3HW}


def _patches(pixels_N3HW: Tensor, patch: int) -> dict[str, Any]:
    """The inputs of SigLIP 2 for images without padding; the patches are cut as its image processor cuts them."""
    images, channels, height, width = pixels_N3HW.shape
    rows, columns = height // patch, width // patch
    pixels = pixels_N3HW[..., : rows * patch, : columns * patch]
    cut = pixels.reshape(images, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": cut.reshape(images, rows * columns, -1),
        "pixel_attention_mask": None,
        "spatial_shapes": torch.tensor([[rows, columns]] * images, device="cpu"),  # read as numbers
    }


def tokens_of(tower: Callable[..., Any], layer: nn.Module | None, inputs: Mapping[str, Any], images: int) -> Tensor:
    """Run a tower and return its tokens `[N, T, D]`, those before the grid included.

    Args:
        tower: the tower, or a function that runs it.
        layer: read at its output: towers differ in which norm they apply after the last layer. None: read at the last
            hidden state, or the last feature map, whose positions become tokens row by row.
        inputs: of `inputs_of`.
        images: N.
    """
    outputs: list[Any] = []
    handle = layer and layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        result = tower(**inputs)
    finally:
        if handle is not None:
            handle.remove()
    hidden = _last_map(result) if layer is None else _first(outputs[-1])
    if hidden.dim() == 4:
        channels_last = hidden.shape[1] == hidden.shape[2] != hidden.shape[3]  # SAM 2; else [N, D, H, W]
        hidden = hidden.flatten(1, 2) if channels_last else hidden.flatten(2).transpose(1, 2)
    return hidden if len(hidden) == images else hidden.reshape(images, -1, hidden.shape[-1])


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _last_map(result: Any) -> Tensor:
    hidden = getattr(result, "last_hidden_state", None)
    if hidden is None and getattr(result, "feature_maps", None):
        hidden = result.feature_maps[-1]  # of a backbone
    if not isinstance(hidden, Tensor):
        raise ValueError("it gives no hidden state")
    return hidden


def layers_of(tower: PreTrainedModel, size: int) -> str | None:
    """Return the name of the list of a tower's layers, if all of them give tokens of one shape.

    None for a tower with stages of different resolutions, or layers that give maps.

    Raises:
        ConfigError: the tower does not encode a square image of `size` pixels.
    """
    # Swin counts its stages as layers; two of them can have one shape.
    depth = None if hasattr(tower.config, "depths") else getattr(tower.config, "num_hidden_layers", None)
    lists = ((name, each) for name, each in tower.named_modules() if isinstance(each, nn.ModuleList))
    name, layers = next(((name, each) for name, each in lists if depth and len(each) == depth), (None, ()))
    shapes: list[Any] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        shapes.append(getattr(_first(output), "shape", ()))

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with _on_meta(tower, size) as (run, inputs, _), torch.no_grad():
            run(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return name if len(shapes) == depth and len({*shapes}) == 1 and len(shapes[0]) == 3 else None


def layout_of(tower: PreTrainedModel, layer: nn.Module | None, size: int) -> Layout:
    """Return what a tower gives for a square image of `size` pixels, read at `layer` (see `tokens_of`).

    Raises:
        ConfigError: it gives neither a token for each position of a square grid nor a feature map.
    """
    with _on_meta(tower, size) as (run, inputs, weights), torch.enable_grad():
        tokens = tokens_of(run, layer, inputs, IMAGES)
        gradients = torch.autograd.grad(tokens.sum(), list(weights.values()), allow_unused=True)
    unused = (name for name, gradient in zip(weights, gradients, strict=True) if gradient is None)
    count, width = tokens.shape[1:]
    return Layout(width, prefix := _prefix(tower, layer, count, size), count - prefix, frozenset(unused))


def _prefix(tower: PreTrainedModel, layer: nn.Module | None, count: int, size: int) -> int:
    """How many of a tower's `count` tokens are before the grid."""
    kind, patch = tower.config.model_type, square(getattr(tower.config, "patch_size", None), "patch_size")
    if layer is not None and patch:
        prefix = count - (size // patch) ** 2
    else:
        # Of stages: a pooled token in front at most (PVT, DINOv3 ConvNeXt). No two numbers in a row are squares.
        prefix = next((extra for extra in (0, 1) if isqrt(count - extra) ** 2 == count - extra), -1)
    if prefix < 0:
        raise ConfigError(
            f"model.vision: '{kind}' gives {count} tokens for {size} px, not one for each position of a square grid, "
            "so it cannot be used."
        )
    return prefix


@contextmanager
def _on_meta(tower: PreTrainedModel, size: int) -> Iterator[tuple[Any, dict[str, Any], dict[str, Tensor]]]:
    """Give (a function that runs the tower on the meta device, its inputs, its floating-point weights there)."""
    kind = tower.config.model_type
    if reason := _why_refused(tower):
        raise ConfigError(f"model.vision: '{kind}' cannot be used, because {reason}.")
    weights = {name: torch.empty_like(weight, device="meta") for name, weight in tower.named_parameters()}
    state = {**weights, **{name: torch.empty_like(each, device="meta") for name, each in tower.named_buffers()}}
    pixels = torch.empty(IMAGES, 3, size, size, device="meta", dtype=next(iter(weights.values())).dtype)
    training = tower.training
    tower.eval()
    try:
        yield (
            lambda **inputs: functional_call(tower, state, (), inputs),
            inputs_of(tower, pixels),
            {name: weight.requires_grad_() for name, weight in weights.items() if weight.is_floating_point()},
        )
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(f"model.vision: '{kind}' does not encode an image of {size} px: {line}.") from error
    finally:
        tower.train(training)


def _why_refused(tower: PreTrainedModel) -> str | None:
    kind = tower.config.model_type
    if "pixel_values" not in _parameters(tower):
        return "it takes other inputs than the pixels of an image"
    if getattr(tower.config, "is_encoder_decoder", False):
        return "it has a decoder, as detectors have"
    needed = [name for name, each in _parameters(tower).items() if each.default is each.empty and each.kind == 1]
    if kind != NAFLEX and (others := [name for name in needed if name != "pixel_values"]):
        return f"it needs {', '.join(others)} beside the pixels of an image"
    return REFUSED.get(kind)


def _parameters(tower: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(tower.forward).parameters
