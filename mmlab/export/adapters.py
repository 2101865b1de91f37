"""Adapters of a run beside an exported model that does not contain them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmlab.config.errors import ConfigError
from mmlab.training.lora import PREFIX, WEIGHTS, import_peft, named_root

MATRICES = ("lora_A", "lora_B")
PIPELINE_PARTS = {"denoiser": ("unet", "unet."), "conditioner": ("text_encoder", "")}
"""Part of a diffusion model → the pipeline's part, and what the names of its layers begin with in the part."""


def write_adapters(adapters: Mapping[Path, nn.Module], exported: nn.Module, out: Path) -> None:
    """Write a run's adapters as one, such that `PeftModel.from_pretrained(exported model, out)` loads it.

    Its layers get the whole names that they have in the exported model: the last words of a language model's layers
    also name layers of the vision tower.

    Args:
        adapters: artifact (a folder of peft) → the part that it belongs to.
        exported: holds the parts' transformers models, or these without their output layers.
        out: the folder.

    Raises:
        ConfigError: an adapter of a part that is no model of transformers, such as a connector.
    """
    read = import_peft().LoraConfig.from_pretrained
    tensors: dict[str, Tensor] = {}
    merged: Any = None
    for artifact, part in adapters.items():
        config: Any = read(str(artifact))
        weights = load_file(artifact / WEIGHTS)
        renamed = {PREFIX + _renamed(name, named_root(part), exported): weights[name] for name in sorted(weights)}
        layers = sorted({_layer(name) for name in renamed})
        if merged is None:
            merged, merged.target_modules = config, layers
        else:
            merged.target_modules += layers
            merged.rank_pattern |= dict.fromkeys(layers, config.r)
            merged.alpha_pattern |= dict.fromkeys(layers, config.lora_alpha)
        tensors |= renamed
    merged.base_model_name_or_path = None
    out.mkdir(parents=True)
    merged.save_pretrained(str(out))
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})


def write_pipeline_adapters(adapters: Mapping[str, Path], out: Path) -> None:
    """Write a run's adapters such that `load_lora_weights(out)` of a StableDiffusionPipeline loads them.

    Args:
        adapters: part → its artifact, a folder of peft.
        out: the folder.

    Raises:
        ConfigError: an adapter of layers that the pipeline does not have.
    """
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    options: dict[str, Any] = {}
    for part, artifact in adapters.items():
        name, prefix = PIPELINE_PARTS[part]
        config = import_peft().LoraConfig.from_pretrained(str(artifact)).to_dict()
        weights = {key.removeprefix(PREFIX): value for key, value in load_file(artifact / WEIGHTS).items()}
        if other := next((key for key in weights if not key.startswith(prefix)), None):
            raise ConfigError(f"The adapter has {_layer(other)}, which no pipeline has; leave merge=false out.")
        layers = sorted({_layer(key).removeprefix(prefix) for key in weights})
        # Where the layers are named by their last words, others of the pipeline's part could be meant, too.
        config |= {"target_modules": layers, "base_model_name_or_path": None}
        options[f"{name}_lora_layers"] = {key.removeprefix(prefix): value for key, value in weights.items()}
        options[f"{name}_lora_adapter_metadata"] = {key: value for key, value in config.items() if value is not None}
    StableDiffusionPipeline.save_lora_weights(out, **options)


def _renamed(name: str, root: Any, exported: nn.Module) -> str:
    """A weight's name in the exported model, without `PREFIX`."""
    places = {module: place for place, module in exported.named_modules()}
    name = name.removeprefix(PREFIX)
    if not isinstance(root, PreTrainedModel):
        raise ConfigError(
            f"The adapter of a {type(root).__name__} cannot be kept apart, as transformers has other layers in its "
            "place; leave merge=false out."
        )
    if root not in places:  # without its output layer
        name, root = name.removeprefix(f"{root.base_model_prefix}."), root.base_model
    return f"{places[root]}.{name}".lstrip(".")


def _layer(name: str) -> str:
    """The layer of an adapter's weight."""
    words = name.removeprefix(PREFIX).split(".")
    return ".".join(words[: next(i for i, word in enumerate(words) if word in MATRICES)])
