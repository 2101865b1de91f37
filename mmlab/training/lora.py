"""Low-rank adapters of parts (LoRA, arXiv 2106.09685), through peft: put on a part, saved as its folders, and merged.

An adapter is put on a part that has its weights. The part's own weights are then frozen, and the adapter is what
learns, what checkpoints hold, and what the run leaves behind.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mmlab.config.errors import ConfigError, nearest
from mmlab.training.config import LoRAConfig
from mmlab.training.trainable import HasUnused, parts_of, set_modes
from mmlab.weights import read_dtype

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL = "all-linear"
ADAPTER = "default"
"""peft's own name for the only adapter of a model."""
PREFIX = "base_model.model."
"""Of the names in peft's files."""


def add_adapters(model: nn.Module, settings: Mapping[str, LoRAConfig]) -> None:
    """Put a fresh adapter on parts of a model, and freeze everything else in them.

    The adapters' random numbers are torch's, drawn in the order of the parts; the model's output stays as it was.

    Args:
        model: filled; its direct children are the parts.
        settings: of each part's adapter.

    Raises:
        ConfigError: layers that the part does not have, or that cannot have an adapter.
    """
    for name, part in parts_of(model).items():
        if name not in settings:
            continue
        if is_adapted(part):
            raise ConfigError(
                f"stage.lora.{name}: the part has an adapter of an earlier run, which cannot be merged into 4-bit "
                f"weights; set model.{name}.quantize=null."
            )
        own, task = settings[name], "CAUSAL_LM" if getattr(named_root(part), "can_generate", bool)() else None
        config = import_peft().LoraConfig(
            r=own.rank,
            lora_alpha=own.alpha,
            lora_dropout=own.dropout,
            target_modules=_targets(part, name, own.targets),
            task_type=task,  # type: ignore[arg-type]
        )
        try:
            _inject(part, config)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"stage.lora.{name}: {str(error).splitlines()[0]}") from error
    set_modes(model)


def named_root(part: nn.Module) -> Any:
    """The module whose names the files of a part's adapter have: its only transformers model, or else the part."""
    models: list[str] = []
    for name, module in part.named_modules():
        if isinstance(module, PreTrainedModel) and not any(f"{name}.".startswith(f"{other}.") for other in models):
            models.append(name)
    return part.get_submodule(models[0]) if len(models) == 1 else part


def is_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter, not a whole part."""
    return (folder / CONFIG).is_file()


def is_adapted(part: nn.Module) -> bool:
    """Whether a part has an adapter that is not merged."""
    return hasattr(named_root(part), "peft_config")


def adapter_weights(part: nn.Module) -> dict[str, Tensor]:
    """The weights of a part's adapter, under their names in peft's files."""
    # With its default, peft would ask the hub whether the vocabulary has changed.
    weights = import_peft().get_peft_model_state_dict(named_root(part), save_embedding_layers=False)
    return {f"{PREFIX}{name}": weight for name, weight in weights.items()}


def save_adapter(part: nn.Module, folder: Path, base: str | None) -> None:
    """Write the adapter of a part as peft does, so that `PeftModel.from_pretrained(base model, folder)` loads it.

    Args:
        part: with an adapter.
        folder: exists.
        base: name or folder of the checkpoint that the adapter belongs to, None if there is no such checkpoint.
    """
    config = copy(named_root(part).peft_config[ADAPTER])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.target_modules = sorted(config.target_modules)  # the order of a set would differ between equal runs
    config.save_pretrained(str(folder))
    weights = {name: weight.detach().contiguous() for name, weight in adapter_weights(part).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def merge_adapter(part: nn.Module, folder: Path) -> None:
    """Read an adapter that `save_adapter` wrote, and add it to the weights of a part; what is trained stays as it is.

    On 4-bit weights it stays an adapter, frozen: rounding the sum to 4 bits would lose most of it.

    Raises:
        ConfigError: it has other layers or shapes than the part.
    """
    config, stored = import_peft().LoraConfig.from_pretrained(str(folder)), load_file(folder / WEIGHTS)
    trained = {weight: weight.requires_grad for weight in part.parameters()}
    try:
        tuner = _inject(part, config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{folder} does not fit the model: {str(error).splitlines()[0]}") from error
    own = adapter_weights(part)
    for name in sorted(stored.keys() | own.keys()):
        there = list(stored[name].shape) if name in stored else "nothing"
        here = list(own[name].shape) if name in own else "nothing"
        if there != here:
            raise ConfigError(f"{folder} does not fit the model: {name} is {there} there and {here} here.")
        own[name].copy_(stored[name])
    part.requires_grad_(False)
    if is_quantized(part):
        tuner.eval()  # a new adapter has dropout
        return
    for module in part.modules():
        if isinstance(weight := getattr(getattr(module, "base_layer", None), "weight", None), nn.Parameter):
            weight.data = weight.data.to(read_dtype(weight))  # the sum is not rounded to the dtype of the file
    tuner.merge_and_unload()
    for weight, learns in trained.items():
        weight.requires_grad_(learns)


def is_quantized(part: nn.Module) -> bool:
    """Whether a part has 4-bit weights."""
    return bool(getattr(named_root(part), "is_loaded_in_4bit", False))


def import_peft() -> Any:
    """Import peft, which takes a second, and with it bitsandbytes where it is installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a package that speeds up its CPU kernels
    import peft

    return peft


def _inject(part: nn.Module, config: Any) -> Any:
    part.requires_grad_(False)
    with _dtypes_shown(part):
        tuner = import_peft().LoraModel(named_root(part), config, ADAPTER)
    for name, weight in part.named_parameters():
        if ".lora_" in name:
            weight.data = weight.data.float()  # peft makes them in the dtype of the part's weights
    return tuner


@contextmanager
def _dtypes_shown(part: nn.Module) -> Iterator[None]:
    """Let weights that are as stored seem to have been read: peft rounds fresh adapters to the dtype of the weights."""
    stored = {weight: weight.data for weight in part.parameters() if read_dtype(weight) != weight.dtype}
    for weight, data in stored.items():
        weight.data = data.new_empty((), dtype=read_dtype(weight)).expand(data.shape)
    try:
        yield
    finally:
        for weight, data in stored.items():
            weight.data = data


def _targets(part: nn.Module, name: str, targets: Any) -> list[str]:
    """The layers of a part that get an adapter: their last words where these name no other module, else whole names."""
    root, layers = named_root(part), _layers(part)
    if targets == ALL:
        chosen = [key for key, layer in layers.items() if not isinstance(layer, nn.Conv2d)]
        if not chosen:
            raise ConfigError(f"stage.lora.{name}.targets: the part has no linear layers; name its convolutions.")
    else:
        words = [*targets] if isinstance(targets, list | tuple) else [] if targets is None else [targets]
        last = sorted({key.rpartition(".")[2] for key in layers})
        for word in words:
            if not any(f".{key}".endswith(f".{word}") for key in layers):
                hint = nearest(str(word), last) or f" Layers: {', '.join(last[:12])}."
                raise ConfigError(f"stage.lora.{name}.targets: no layer is named '{word}'.{hint}")
        chosen = [key for key in layers if any(f".{key}".endswith(f".{word}") for word in words)]
    if not chosen:
        raise ConfigError(f"stage.lora.{name}.targets is empty; name layers, or set {ALL}.")
    short = sorted({key.rpartition(".")[2] for key in chosen})
    others = {key.rpartition(".")[2] for key, _ in root.named_modules() if key not in set(chosen)}
    return sorted(chosen) if others & set(short) else short


def _layers(part: nn.Module) -> dict[str, nn.Module]:
    """The layers of a part that may have an adapter, by their names in its root: those on which its output depends, but
    not a language model's output layer."""
    root = named_root(part)
    head = root.get_output_embeddings() if isinstance(root, PreTrainedModel) else None
    unused = {weight for module in part.modules() if isinstance(module, HasUnused) for weight in module.unused()}
    # torch's attention reads the weights of its layers without calling them.
    attentions = [module for module in root.modules() if isinstance(module, nn.MultiheadAttention)]
    inner = {child for attention in attentions for child in attention.modules()}
    return {
        name: module
        for name, module in root.named_modules()
        if isinstance(module, nn.Linear | Conv1D | nn.Conv2d)
        and not (module is head or module in inner or module.weight in unused)
    }
