"""A checkpoint of LLaVA as parts of our model, whatever its layout.

Nothing is computed: tensors are mapped from their files and renamed, so a checkpoint of any size takes no memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from mmlab.config.errors import ConfigError, nearest
from mmlab.model.checkpoint_files import read_checkpoint, read_file
from mmlab.model.foreign_checkpoint import ForeignCheckpoint

BUFFERS = ("position_ids", "rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of names that older versions saved and none needs."""


NOT_FIELDS = (
    "model_type", "_name_or_path", "auto_map", "architectures", "transformers_version", "torch_dtype", "dtype",
)  # fmt: skip
"""What a config says about its file, not about its model."""


@dataclass
class LlavaCheckpoint:
    """What a checkpoint holds.

    Attributes:
        path: its folder or file.
        kind: `whole`, `connector` or `lora`.
        layout: in words.
        language: config of the language model; None if neither its weights nor its config are there.
        vision: config of the vision tower; None if its weights are not there.
        vision_source: where the tower comes from, if the checkpoint names it.
        feature_layer, features: settings of the vision encoder; `all` of the port is every token that the tower has.
        base: where the language model comes from, if the checkpoint names it.
        aspect: how images become square; None if the checkpoint does not say, or has `pinpoints`.
        pinpoints: height and width of each grid of tiles in pixels; none of a checkpoint that sees one square.
        normalization: mean and standard deviation of the pixels, if the checkpoint has them.
        image_token: id of the token that stands for an image, in the port.
        weights: part → tensors by name; the connector's are our names, the others those of transformers.
        adapter: LoRA's matrices by name, as peft saves them, and its config.
    """

    path: Path
    kind: str
    layout: str
    language: PretrainedConfig | None = None
    vision: PretrainedConfig | None = None
    vision_source: str | None = None
    feature_layer: int = -2
    features: str = "patch"
    base: str | None = None
    aspect: str | None = None
    pinpoints: list[list[int]] = field(default_factory=list)
    normalization: dict[str, list[float]] = field(default_factory=dict)
    image_token: int | None = None
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    adapter: tuple[dict[str, Tensor], dict[str, Any]] | None = None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a folder or a file; raises ConfigError where that fails."""
    try:
        if path.suffix == ".pth":  # MiniGPT-4's, with the state of its optimizer beside the weights
            file = ForeignCheckpoint(path)
            weights = file.content.get("model", file.content)
            return file.tensors({name: value for name, value in weights.items() if "llama_proj" in name})
        return read_checkpoint(path) if path.is_dir() else read_file(path)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be loaded: {error}") from error


def part_config(path: Path, kind: str, fields: Mapping[str, Any]) -> PretrainedConfig:
    """A transformers config of some model_type; raises ConfigError where the fields do not fit."""
    if kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"{path} has a part '{kind}', which transformers does not know.{nearest(kind, CONFIG_MAPPING)}"
        )
    fields = {key: value for key, value in fields.items() if key not in NOT_FIELDS}
    try:
        return AutoConfig.for_model(kind, **fields)
    except Exception as error:  # of a dataclass, a check or a config's own constructor
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"{path}: its config does not fit {kind}: {reason}") from error


def require(checkpoint: LlavaCheckpoint, *parts: str) -> None:
    """Raise ConfigError for a checkpoint without tensors of one of these parts."""
    for part in parts:
        if not checkpoint.weights[part]:
            names = {name for tensors in checkpoint.weights.values() for name in tensors}
            raise ConfigError(
                f"{checkpoint.path} has no weights of the {part}; it contains {', '.join(sorted(names)[:3]) or 'none'}."
            )


def aligned(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A tower's tensors by the names of this version of transformers, which may have `vision_model.` in front."""
    own, prefix = model.state_dict().keys(), "vision_model."
    names = {name: (name, name.removeprefix(prefix), f"{prefix}{name}") for name in tensors}
    return {next((each for each in names[name] if each in own), name): tensor for name, tensor in tensors.items()}
