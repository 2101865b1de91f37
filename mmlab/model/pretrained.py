"""Building parts from settings, and filling them with the weights of a checkpoint on the hub or in a folder.

A part that starts from pretrained weights is built on the meta device, which draws no random numbers and takes no
memory. Exceptions are the vision tower of BLIP-2, the Q-Former, `VQAutoencoder`, `DiT` and `LPIPS`, whose constructors
draw random numbers. `load_pretrained` fills a part afterwards, unless the artifact of a run does.
"""

import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from mmlab.config.errors import ConfigError, nearest
from mmlab.model.checkpoint_files import check_gguf, read_checkpoint, read_json, split_gguf
from mmlab.model.config import PretrainedPartConfig
from mmlab.weights import fill, verify_files

# Never run code from a checkpoint, nor ask on the terminal whether to.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
# Keys of a checkpoint's configs with which transformers would run code from the checkpoint.
CODE_KEYS = ("auto_map", "_attn_implementation_internal", "trust_remote_code")

WHOLE = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
"""Dtypes of whole models; fp8 is one of stored weights only."""


def read_config(settings: PretrainedPartConfig, part: str, **defaults: Any) -> PretrainedConfig:
    """Return the transformers config of a part.

    Args:
        settings: `architecture` is the whole config when `init` is `random`; else `source` has it. On the meta device
            the source is only read if there is no architecture.
        part: name of the part, for messages.
        **defaults: fields that `architecture` may leave out; those that this model does not have are ignored.

    Raises:
        ConfigError: the source cannot be read, asks for remote code, has quantized weights, or the architecture is
            incomplete.
    """
    described = settings.architecture or "model_type" in defaults
    if settings.init == "random" or (on_meta() and described):
        return _from_architecture(settings.architecture, defaults, part)
    source = require_source(settings, part)
    refuse_code(source)
    verify_files(Path(source).expanduser(), weights=False)
    folder, gguf = split_gguf(source)
    try:
        check_gguf(source)
        config = AutoConfig.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}), **NO_CODE)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise _unreadable(source, part, error) from error
    quantization = vars(config).pop("quantization_config", None)  # of a GGUF file: it is read as plain numbers
    if quantization is not None and not gguf:
        raise ConfigError(
            f"model.{part}.source={source} has quantized weights ({_method(quantization)}), which are not read; name "
            "the checkpoint that they were made from (model.language.quantize=nf4 then stores it in 4 bits)."
        )
    return config


def _method(quantization: Any) -> str:
    fields = quantization if isinstance(quantization, dict) else vars(quantization)
    return str(getattr(method := fields.get("quant_method"), "value", method))


def require_source(settings: PretrainedPartConfig, part: str) -> str:
    """Return the source of a part with init=pretrained; raises ConfigError where it is not set."""
    if settings.source is None:
        raise ConfigError(
            f"model.{part}.source is not set; give a hub name or a folder, or set model.{part}.init=random."
        )
    return settings.source


def _unreadable(source: str, part: str, error: Exception) -> ConfigError:
    return ConfigError(f"model.{part}.source={source} cannot be loaded: {reason(error)}")


def reason(error: Exception) -> str:
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
        why = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"model.{part}.architecture does not fit {model_type}: {why}") from error


def on_meta() -> bool:
    """Whether models are built only to count their parameters: no weights are then read, and a config only if there is
    no `architecture`."""
    return torch.get_default_device().type == "meta"


def refuse_code(source: str | Path) -> None:
    """Raise ConfigError when a config in a local folder asks transformers to run code of the checkpoint."""
    folder, _ = split_gguf(source)
    for path in (Path(folder) / name for name in CONFIGS):
        fields = read_json(path) or {}
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

    Raises:
        ConfigError: sizes with which it cannot be built.
    """
    try:
        if settings.init == "random" or on_meta():
            return auto.from_config(config, **options)
        with torch.device("meta"):
            return auto.from_config(config, dtype=torch.float32, **options).eval()
    except ArithmeticError as error:
        raise ConfigError(f"'{config.model_type}' cannot be built with a size of 0 ({error}).") from error


def load_pretrained(
    model: PreTrainedModel, settings: PretrainedPartConfig, part: str, as_stored: bool = False, **options: Any
) -> None:
    """Fill a model of `build_model` from its source; with init=random it keeps its weights. Arguments: `load_weights`.

    Raises:
        ConfigError: the source cannot be read, or does not have all weights.
    """
    if settings.init == "pretrained":
        source = require_source(settings, part)
        try:
            refuse_code(source)
            _fill_from(model, source, model.config, as_stored, **options)
        except (OSError, ValueError) as error:
            raise _unreadable(source, part, error) from error


def load_weights(model: PreTrainedModel, folder: Path, as_stored: bool = False, **options: Any) -> None:
    """Fill a model from a transformers folder of the same architecture, strictly.

    Args:
        model: with weights, or on the meta device.
        folder: with a config and weights.
        as_stored: a model on the meta device takes the dtypes of the weights, instead of casting them to its own.
        **options: arguments that the model's class was built with beside its config.

    Raises:
        ConfigError: another architecture, other names or shapes, or files that cannot be read.
    """
    refuse_code(folder)
    try:
        config = AutoConfig.from_pretrained(folder, **NO_CODE)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ConfigError(f"{folder} cannot be loaded: {reason(error)}") from error
    if config.model_type != model.config.model_type:
        raise ConfigError(
            f"{folder} does not fit the model: it is a {config.model_type}, not a {model.config.model_type}."
        )
    try:
        _fill_from(model, folder, config, as_stored, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} cannot be loaded: {reason(error)}") from error


def _fill_from(model: Any, source: str | Path, config: PretrainedConfig, as_stored: bool, **options: Any) -> None:
    """Read a transformers checkpoint; a model on the meta device takes its tensors over."""
    quieten()
    stored, missing = _read_model(type(model), source, config, options)
    if missing:
        raise ConfigError(
            f"{source} does not fill the model: {len(missing)} weights are missing, such as {missing[0]}."
        )
    weights = stored.state_dict()
    if model.device.type != "meta":
        fill(model, weights, source)
        return
    buffers = [
        (name, buffer, getattr(module, buffer))
        for name, module in stored.named_modules()
        for buffer in module._non_persistent_buffers_set
    ]
    for name, weight in model.named_parameters() if as_stored else ():
        weight.data = weight.data.to(weights[name].dtype)
    stored.to_empty(device="meta")  # each tensor can then be freed as soon as it was cast
    fill(model, weights, source)
    for name, buffer, value in buffers:
        owner = model.get_submodule(name)
        setattr(owner, buffer, value.to(getattr(owner, buffer).dtype))
    model.tie_weights()
    if model.can_generate():
        model.generation_config = _generation_config(source, stored)


def _read_model(
    kind: Any, source: str | Path, config: PretrainedConfig, options: dict[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    """Return a model of class `kind` with a checkpoint's weights as they are stored, and the weights it lacks.

    transformers renames what it knows under older names, and finds a tower in a checkpoint of several.
    """
    options = {"config": config, "output_loading_info": True, **NO_CODE, **options}
    folder, gguf = split_gguf(source)
    with torch.device("cpu"), without_report():
        if gguf:
            options |= {"gguf_file": gguf, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
            stored, info = kind.from_pretrained(folder, **options)
        else:
            tensors = read_checkpoint(source)
            for name in tensors:  # transformers would take the numbers for weights
                if name.endswith(".weight") and not tensors[name].is_floating_point():
                    raise ValueError(f"its weights are quantized ({name} is {tensors[name].dtype}), and are not read.")
            stored, info = kind.from_pretrained(None, state_dict=tensors, dtype=common_dtype(tensors), **options)
    return stored, [*sorted(info["missing_keys"]), *(key[0] for key in info["mismatched_keys"])]


@contextmanager
def without_report() -> Iterator[None]:
    """Keep transformers from listing weights that a tower does not need, and GGUF's progress bar from files."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of all floating-point tensors; float32, which holds the values of each, if they have several."""
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes < WHOLE else torch.float32


def _generation_config(source: str | Path, stored: PreTrainedModel) -> Any:
    folder, gguf = split_gguf(source)
    try:
        with without_report():  # on a temperature without do_sample, as Vicuna 1.5 has
            return stored.generation_config if gguf else GenerationConfig.from_pretrained(folder)
    except OSError:  # it has none, so the model's config says how it generates
        return stored.generation_config


def read_tensors(source: str, prefixes: tuple[str, ...], part: str) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint whose names begin with one of `prefixes`, as they are stored.

    Only the files with such tensors are opened, or downloaded: a Q-Former is a hundredth of its checkpoint.

    Args:
        source: hub name or local folder.
        prefixes: beginnings of names.
        part: name of the part, for messages.

    Raises:
        ConfigError: the source has no weights, or they cannot be read.
    """
    quieten()
    try:
        return read_checkpoint(source, prefixes)
    except (OSError, ValueError) as error:
        raise _unreadable(source, part, error) from error


def quieten() -> None:
    """Show transformers' progress bars in terminals only: elsewhere each would be a line of control characters."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
