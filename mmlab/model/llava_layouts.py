"""Checkpoints of LLaVA: which layout a folder has, and that of the transformers port."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, eye
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from mmlab.config.errors import ConfigError
from mmlab.model.checkpoint_files import PICKLED, SAFETENSORS, read_json
from mmlab.model.llava_checkpoint import BUFFERS, LlavaCheckpoint, part_config, read_weights, require
from mmlab.model.llava_own import PROJECTOR, pinpoints, read_lora, read_own, read_projector
from mmlab.model.pretrained import quieten

PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]
"""Files of a checkpoint that are downloaded."""
# The port's names, with those that transformers 5 has in memory; the longer first.
PORT = {
    "model.vision_tower.": "vision",
    "vision_tower.": "vision",
    "model.multi_modal_projector.": "connector",
    "multi_modal_projector.": "connector",
    "model.language_model.": "base",
    "language_model.": "language",
    "model.image_newline": "newline",
    "image_newline": "newline",
}


def downloaded(name: str) -> Path:
    """Download a checkpoint from the hub, its safetensors if it has weights as both; return its folder in the cache.

    Raises:
        ConfigError: there is none of that name, or no connection.
    """
    import huggingface_hub

    quieten()
    try:
        files = [] if huggingface_hub.is_offline_mode() else huggingface_hub.list_repo_files(name)
        both = any(file.startswith(("model.safetensors", "model-")) for file in files)
        patterns = {"allow_patterns": PATTERNS, "ignore_patterns": [f"{PICKLED}*", "pytorch_model-*"] if both else None}
        return Path(huggingface_hub.snapshot_download(name, **patterns))
    except Exception as error:  # of the hub, or of any library that connects to it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"There is no folder {name}, and it cannot be read from the hub: {reason}") from error


def read_llava(path: Path) -> LlavaCheckpoint:
    """Read a checkpoint's configs and map its tensors.

    Args:
        path: its folder; or the file of a projector.

    Raises:
        ConfigError: a checkpoint of something else, of a variant that our model does not compute, or one that is not
            complete.
    """
    if path.is_file():
        return read_projector(path)
    config = read_json(path / "config.json")
    if (path / "adapter_config.json").is_file():
        return read_lora(path, config)
    if config is None:
        names = ", ".join(sorted(each.name for each in path.iterdir())[:4]) or "nothing"
        raise ConfigError(f"{path} is not a LLaVA checkpoint: it has no config.json; it contains {names}.")
    if "text_config" in config and "vision_config" in config:
        return _port(path, config)
    if "mm_vision_tower" not in config:
        kind = config.get("model_type", "unknown model")
        uses = "model.vision.source" if "vision" in str(kind) or kind == "clip" else "model.language.source"
        raise ConfigError(f"{path} is a {kind}, not a LLaVA checkpoint; name its folder as {uses} instead.")
    whole = any((path / f"{name}{end}").is_file() for name in (SAFETENSORS, PICKLED) for end in ("", ".index.json"))
    return read_own(path, config) if whole or not (path / PROJECTOR).is_file() else read_projector(path / PROJECTOR)


def _port(path: Path, config: dict[str, Any]) -> LlavaCheckpoint:
    """`LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration`, with the names of any version."""
    kind, layers = config.get("model_type"), config.get("vision_feature_layer", -2)
    tiled = kind == "llava_next"
    if kind not in ("llava", "llava_next"):
        raise ConfigError(
            f"{path} is a {kind}; of transformers' models, `llava` (LLaVA and LLaVA-1.5) and `llava_next` can be "
            "converted."
        )
    if not isinstance(layers, int):
        raise ConfigError(f"{path} reads its vision tower at the layers {layers}; mmlab's encoder reads one.")
    if config.get("quantization_config") is not None:
        raise ConfigError(f"{path} has quantized weights; convert the checkpoint it was made from.")
    if (path / "adapter" / "adapter_config.json").is_file():  # as mmlab export writes it with merge=false
        raise ConfigError(f"{path} has an adapter beside its weights, which is not read; export it with merge=true.")
    text, vision = config["text_config"], config["vision_config"]
    strategy = config.get("vision_feature_select_strategy", "default")
    checkpoint = LlavaCheckpoint(
        path,
        "whole",
        "transformers'",
        part_config(path, text.get("model_type", "llama"), text),
        part_config(path, vision.get("model_type", "clip_vision_model"), vision),
        feature_layer=layers,
        features={"full": "all"}.get(strategy, "patch"),
        image_token=config.get("image_token_id", config.get("image_token_index", 32000)),
    )
    if "tie_word_embeddings" in config and "tie_word_embeddings" not in text:
        checkpoint.language.tie_word_embeddings = config["tie_word_embeddings"]  # type: ignore[union-attr]
    whole = read_json(path / "processor_config.json") or {}
    processor = read_json(path / "preprocessor_config.json") or whole.get("image_processor") or {}
    checkpoint.aspect = None if tiled else _aspect(processor)
    if tiled:
        checkpoint.pinpoints = pinpoints(path, config.get("image_grid_pinpoints"))
    checkpoint.normalization = {key: processor[key] for key in ("image_mean", "image_std") if key in processor}
    checkpoint.weights = _split_port(read_weights(path), checkpoint.language)  # type: ignore[arg-type]
    checkpoint.weights["connector"] = _port_connector(path, checkpoint.weights["connector"], config)
    require(checkpoint, "language", "connector", "vision", *(["newline"] if tiled else []))
    return checkpoint


def _aspect(processor: Mapping[str, Any]) -> str | None:
    """How the port's image processor makes an image square."""
    if processor.get("do_pad"):
        return "pad"
    if processor.get("do_center_crop"):
        return "crop"
    return "stretch" if "height" in (processor.get("size") or {}) else None


def _split_port(tensors: Mapping[str, Tensor], language: PretrainedConfig) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors of the port by part; the language model's get the names that it has alone."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(language)]
    prefix = kind.base_model_prefix
    weights: dict[str, dict[str, Tensor]] = {"language": {}, "connector": {}, "vision": {}, "newline": {}}
    for name, tensor in tensors.items():
        before = next((each for each in PORT if name.startswith(each)), "")
        part, rest = PORT.get(before, "language"), name.removeprefix(before)
        if part == "language" and rest.startswith("model."):  # the base of any family, as transformers 5 saves it
            part, rest = "base", rest.removeprefix("model.")
        if part == "newline":
            weights[part]["feature"] = tensor
        elif not name.endswith(BUFFERS):
            weights["language" if part == "base" else part][f"{prefix}.{rest}" if part == "base" else rest] = tensor
    return weights


def _port_connector(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The port's projector of two layers, in our names; a linear one has a second layer that changes nothing.

    Raises:
        ConfigError: an activation that is not LLaVA's.
    """
    act, ours = config.get("projector_hidden_act", "gelu"), {"linear_1": "layers.0", "linear_2": "layers.2"}
    second = tensors.get("linear_2.weight")
    if act == "linear" and second is not None and second.float().equal(eye(len(second))):
        return {name.replace("linear_1", "proj"): tensor for name, tensor in tensors.items() if "linear_1" in name}
    if act != "gelu":
        raise ConfigError(f"{path} has the activation '{act}' in its projector; gelu can be converted.")
    return {f"{ours.get(name.split('.')[0], name)}.{name.split('.')[-1]}": tensor for name, tensor in tensors.items()}
