"""Building parts from settings, and filling them with the weights of a checkpoint on the hub or in a folder.

A part that starts from pretrained weights is built on the meta device, which draws no random numbers and takes no
memory. Exceptions are the vision tower of BLIP-2, the Q-Former, `VQAutoencoder` and `LPIPS`, whose constructors draw
random numbers. `load_pretrained` fills a part afterwards, unless the artifact of a run does.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging
from transformers.utils.hub import cached_file

from mmlab.config.errors import ConfigError, nearest
from mmlab.model.config import PretrainedPartConfig
from mmlab.weights import fill, verify_files

# Never run code from a checkpoint, nor ask on the terminal whether to.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
# Keys of a checkpoint's configs with which transformers would run code from the checkpoint.
CODE_KEYS = ("auto_map", "_attn_implementation_internal", "trust_remote_code")


def read_config(settings: PretrainedPartConfig, part: str, **defaults: Any) -> PretrainedConfig:
    """Return the transformers config of a part.

    Args:
        settings: `architecture` is the whole config when `init` is `random`; else `source` has it.
        part: name of the part, for messages.
        **defaults: fields that `architecture` may leave out; those that this model does not have are ignored.

    Raises:
        ConfigError: the source cannot be read, asks for remote code, or the architecture is incomplete.
    """
    if settings.init == "random" or on_meta():
        return _from_architecture(settings.architecture, defaults, part)
    source = require_source(settings, part)
    refuse_code(source)
    verify_files(Path(source).expanduser(), weights=False)
    try:
        return AutoConfig.from_pretrained(source, **NO_CODE)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise _unreadable(source, part, error) from error


def require_source(settings: PretrainedPartConfig, part: str) -> str:
    """Return the source of a part with init=pretrained; raises ConfigError where it is not set."""
    if settings.source is None:
        raise ConfigError(
            f"model.{part}.source is not set; give a hub name or a folder, or set model.{part}.init=random."
        )
    return settings.source


def _unreadable(source: str, part: str, error: Exception) -> ConfigError:
    return ConfigError(f"model.{part}.source={source} cannot be loaded: {_reason(error)}")


def _reason(error: Exception) -> str:
    """Return what a user can act on in a message of transformers, on one line."""
    if "trust_remote_code" in str(error):
        return "it needs code from the checkpoint, which is not run."
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # The first line of an invalid config says only which check failed.
    return lines[-1].strip() if isinstance(error, StrictDataclassError) else lines[0]


def _from_architecture(architecture: dict[str, Any], defaults: dict[str, Any], part: str) -> PretrainedConfig:
    fields = dict(architecture)
    model_type = fields.pop("model_type", defaults.get("model_type"))
    if model_type is None:
        raise ConfigError(f"model.{part}.init=random needs model.{part}.architecture.model_type.")
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError as error:
        from transformers import CONFIG_MAPPING

        hint = nearest(model_type, CONFIG_MAPPING)
        raise ConfigError(f"transformers has no model_type '{model_type}' (model.{part}).{hint}") from error
    names = {*default.to_dict(), *default.attribute_map}
    for name in sorted(set(fields) - names):
        raise ConfigError(f"model.{part}.architecture has no field '{name}' for {model_type}.{nearest(name, names)}")
    fields = {name: value for name, value in defaults.items() if name in names - {"model_type"}} | fields
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"model.{part}.architecture does not fit {model_type}: {reason}") from error


def on_meta() -> bool:
    """Whether models are built only to count their parameters: nothing is then read from the hub or a folder."""
    return torch.get_default_device().type == "meta"


def refuse_code(source: str | Path) -> None:
    """Raise ConfigError when a config in a local folder asks transformers to run code of the checkpoint."""
    for path in (Path(source).expanduser() / name for name in CONFIGS):
        if not path.is_file():
            continue
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}.") from error
        if keys := [key for key in CODE_KEYS if key in fields]:
            raise ConfigError(
                f"{path} has '{keys[0]}', which asks to run code from the checkpoint. Such code is never run; remove "
                "the key to load the checkpoint without it."
            )


def build_model(auto: Any, config: PretrainedConfig, settings: PretrainedPartConfig, **options: Any) -> PreTrainedModel:
    """Build a model with random weights, or on the meta device where `load_pretrained` is to fill it; fp32.

    Args:
        auto: transformers' Auto class.
        config: of the model.
        settings: of the part.
        **options: further arguments of the model's class.
    """
    if settings.init == "random" or on_meta():
        return auto.from_config(config, **options)
    with torch.device("meta"):
        return auto.from_config(config, dtype=torch.float32, **options).eval()


def load_pretrained(model: PreTrainedModel, settings: PretrainedPartConfig, part: str, **options: Any) -> None:
    """Fill a model of `build_model` from its source; with init=random it keeps its weights.

    Raises:
        ConfigError: the source cannot be read, or does not have all weights.
    """
    if settings.init == "pretrained":
        source = require_source(settings, part)
        try:
            refuse_code(source)
            _fill_from(model, source, model.config, **options)
        except (OSError, ValueError) as error:
            raise _unreadable(source, part, error) from error


def load_weights(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """Fill a model from a transformers folder of the same architecture, strictly.

    Args:
        model: with weights, or on the meta device.
        folder: with a config and safetensors.
        **options: arguments that the model's class was built with beside its config.

    Raises:
        ConfigError: another architecture, or other names or shapes.
    """
    refuse_code(folder)
    config = AutoConfig.from_pretrained(folder, **NO_CODE)
    if config.model_type != model.config.model_type:
        raise ConfigError(
            f"{folder} does not fit the model: it is a {config.model_type}, not a {model.config.model_type}."
        )
    _fill_from(model, folder, config, **options)


def _fill_from(model: Any, source: str | Path, config: PretrainedConfig, **options: Any) -> None:
    """Read a transformers checkpoint (safetensors only) as fp32; a model on the meta device takes its tensors over."""
    quieten()
    options = {"config": config, "dtype": torch.float32, "use_safetensors": True, **NO_CODE, **options}
    with torch.device("cpu"):
        stored, info = type(model).from_pretrained(source, output_loading_info=True, **options)
    if missing := [*sorted(info["missing_keys"]), *(key[0] for key in info["mismatched_keys"])]:
        raise ConfigError(
            f"{source} does not fill the model: {len(missing)} weights are missing, such as {missing[0]}."
        )
    empty = model.device.type == "meta"
    fill(model, stored.state_dict(), source)
    if empty:
        for name, module in stored.named_modules():
            for buffer in module._non_persistent_buffers_set:
                setattr(model.get_submodule(name), buffer, getattr(module, buffer))
        model.tie_weights()
        if model.can_generate():
            model.generation_config = stored.generation_config


def read_tensors(source: str, prefixes: tuple[str, ...], part: str) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint whose names begin with one of `prefixes`, as fp32.

    Only the files with such tensors are opened, or downloaded: a Q-Former is a hundredth of its checkpoint.

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
        tensors: dict[str, Tensor] = {}
        for name in sorted(names):
            with safe_open(cached_file(source, name), "pt") as file:
                tensors |= {key: file.get_tensor(key).float() for key in file.offset_keys() if key.startswith(prefixes)}
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(source, part, error) from error
    return tensors


def quieten() -> None:
    """Show transformers' progress bars in terminals only: elsewhere each would be a line of control characters."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def fit_tokenizer(tokenizer: PreTrainedTokenizerFast, vocabulary: int, part: str) -> None:
    """Accept a tokenizer with a few tokens more than the model: texts with such a token are refused one by one.

    A padding token among them is replaced, as padding is never attended to.

    Raises:
        ConfigError: more than a tenth of the tokens have no embedding, or one that begins or ends every text.
    """
    excess = len(tokenizer) - vocabulary
    if excess * 10 > len(tokenizer):
        raise ConfigError(
            f"model.{part}: the tokenizer has {len(tokenizer)} tokens, the model only {vocabulary}; set "
            f"model.{part}.tokenizer to the model's own."
        )
    padding: Any = tokenizer.pad_token_id
    if excess > 0 and padding is not None and padding >= vocabulary:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    for name in ("bos", "eos", "pad", "unk"):
        number, token = getattr(tokenizer, f"{name}_token_id"), getattr(tokenizer, f"{name}_token")
        if isinstance(number, int) and number >= vocabulary:
            raise ConfigError(
                f"model.{part}: the model has {vocabulary} tokens, and no embedding of the tokenizer's {name}_token "
                f"'{token}'."
            )


def load_tokenizer(source: str | None, part: str = "language") -> PreTrainedTokenizerFast:
    """Load a fast tokenizer; a missing pad token becomes the end token (padding is never attended to).

    Args:
        source: hub name or local folder.
        part: name of the part that it belongs to, for messages.

    Raises:
        ConfigError: no source, unreadable, or without character offsets (not a fast tokenizer).
    """
    if source is None:
        raise ConfigError(f"model.{part}.tokenizer is not set; give a hub name or a folder with tokenizer.json.")
    refuse_code(source)
    verify_files(Path(source).expanduser(), weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **NO_CODE)
    except Exception as error:  # tokenizers has no class of its own for a file that it cannot read
        raise ConfigError(f"The tokenizer {source} cannot be loaded: {_reason(error)}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"The tokenizer {source} is not a fast one; labels need its character offsets.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
