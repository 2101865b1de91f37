"""Loading and saving parts as transformers folders, from the hub, a local folder, or random weights."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file

from mmlab.config.errors import ConfigError, nearest
from mmlab.weights import fill

# A checkpoint's config that asks for code beyond the installed transformers is refused: loading it would run that code.
CODE_KEYS = ("auto_map", "_attn_implementation_internal", "trust_remote_code")


def read_config(source: str | None, architecture: dict[str, Any], init: str, part: str) -> PretrainedConfig:
    """Return the transformers config of a part.

    Args:
        source: hub name or local folder, read when `init` is `pretrained`.
        architecture: transformers config fields with `model_type`; the whole config when `init` is `random`.
        init: `pretrained` or `random`.
        part: name of the part, for messages.

    Raises:
        ConfigError: the source cannot be read, asks for remote code, or the architecture is incomplete.
    """
    if init == "random" or on_meta():
        return _from_architecture(architecture, part)
    if source is None:
        raise ConfigError(
            f"model.{part}.source is not set; give a hub name or a folder, or set model.{part}.init=random."
        )
    refuse_code(source)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.{part}.source={source} cannot be loaded: {reason}") from error


def _from_architecture(architecture: dict[str, Any], part: str) -> PretrainedConfig:
    fields = dict(architecture)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ConfigError(f"model.{part}.init=random needs model.{part}.architecture.model_type.")
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        from transformers import CONFIG_MAPPING

        hint = nearest(model_type, CONFIG_MAPPING)
        raise ConfigError(f"transformers has no model_type '{model_type}' (model.{part}).{hint}") from error
    known = {*type(config)().to_dict(), *config.attribute_map}
    for name in sorted(set(fields) - known):
        raise ConfigError(f"model.{part}.architecture has no field '{name}' for {model_type}.{nearest(name, known)}")
    return config


def on_meta() -> bool:
    """Whether parts are being built for counting only: then nothing is read, neither hub nor folder."""
    return torch.get_default_device().type == "meta"


def refuse_code(source: str) -> None:
    """Raise ConfigError when a local folder's config.json asks transformers to run code of its own."""
    path = Path(source) / "config.json"
    if not path.is_file():
        return
    fields = json.loads(path.read_text())
    found = [key for key in CODE_KEYS if key in fields]
    if found:
        raise ConfigError(f"{path} holds '{found[0]}', which would run code from the checkpoint; remove it to load it.")


def build_pretrained(
    auto: Any, config: PretrainedConfig, source: str | None, init: str, part: str, **kwargs: Any
) -> PreTrainedModel:
    """Build a part with random weights or load it; weights are fp32 and only safetensors are read."""
    if init == "random" or on_meta():
        return auto.from_config(config, **kwargs)
    quieten()
    try:
        model, info = auto.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **kwargs,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.{part}.source={source} cannot be loaded: {reason}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted(info["missing_keys"]) + [key[0] for key in info["mismatched_keys"]]
        raise ConfigError(f"{source} does not fill model.{part}: {len(missing)} weights missing, first {missing[0]}.")
    return model


def read_tensors(source: str, prefixes: tuple[str, ...], part: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin with one of `prefixes`, as fp32.

    Of a checkpoint in several files only those that hold such tensors are opened, or fetched from the hub: a
    Q-Former is a hundredth of the checkpoint that it comes in.

    Args:
        source: hub name or local folder with safetensors.
        prefixes: beginnings of names.
        part: name of the part, for messages.

    Raises:
        ConfigError: the source has no safetensors, or they cannot be read.
    """
    quieten()
    try:
        index = cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
        if index is None:
            names = {"model.safetensors"}
        else:
            places = json.loads(Path(index).read_text())["weight_map"]
            names = {file for key, file in places.items() if key.startswith(prefixes)}
        found: dict[str, Tensor] = {}
        for name in sorted(names):
            with safe_open(cached_file(source, name), "pt") as file:
                found |= {key: file.get_tensor(key).float() for key in file.offset_keys() if key.startswith(prefixes)}
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.{part}.source={source} cannot be loaded: {reason}") from error
    return found


def quieten() -> None:
    """Keep transformers' progress bars to terminals: elsewhere each would be a line of control characters."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def load_weights(model: PreTrainedModel, folder: Path, **kwargs: Any) -> None:
    """Fill a built model from a transformers folder of the same architecture, strictly.

    Args:
        model: the built model.
        folder: with a config and safetensors.
        **kwargs: arguments that the model's class was built with beside its config.

    Raises:
        ConfigError: another architecture, or other names or shapes.
    """
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != model.config.model_type:
        raise ConfigError(
            f"{folder} does not fit the model: it is a {config.model_type}, here is a {model.config.model_type}."
        )
    quieten()
    with torch.device("cpu"):
        options = {"config": config, "dtype": torch.float32, "use_safetensors": True, **kwargs}
        stored = type(model).from_pretrained(folder, **options)
    fill(model, stored.state_dict(), folder)
