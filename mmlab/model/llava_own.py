"""Checkpoints in the layout of LLaVA's own repository: whole models, projectors, and what LoRA training leaves."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mmlab.config.errors import ConfigError, nearest
from mmlab.model.checkpoint_files import read_json
from mmlab.model.foreign_weights import matrices_of
from mmlab.model.llava_checkpoint import BUFFERS, LlavaCheckpoint, part_config, read_weights, require

PROJECTOR, EXTRA = "mm_projector.bin", "non_lora_trainables.bin"
"""What LLaVA's stage 1 leaves, and what its LoRA training leaves beside the adapter."""
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
# Beginnings of the fields of LLaVA's config that are not the language model's.
OWN_FIELDS = ("mm_", "tune_", "freeze_", "unfreeze_", "image_", "use_mm", "pretrain_mm", "tokenizer_", "vision_")
FAMILIES = {"qwen": "qwen2"}
"""Family in a class's name → model_type, where they differ."""


def read_own(path: Path, config: dict[str, Any]) -> LlavaCheckpoint:
    """A model of LLaVA's own repository: the language model's config and names, with a projector among them."""
    settings = _own_settings(path, config)
    checkpoint = LlavaCheckpoint(path, "whole", "LLaVA's own", **settings)
    checkpoint.weights = split_own(read_weights(path))
    final = checkpoint.weights["language"].get("model.norm.weight")
    # Of a Llama it is near 1 or above, and 0 in a difference.
    if settings["language"].model_type == "llama" and final is not None and final.float().abs().mean() < 0.1:
        raise ConfigError(
            f"{path} holds the differences to its base model, not weights (a delta); add them to the base with LLaVA's "
            "`llava.model.apply_delta` first."
        )
    require(checkpoint, "language", "connector", *(["newline"] if checkpoint.pinpoints else []))
    return checkpoint


def _own_settings(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Fields of a checkpoint that LLaVA's config states.

    Raises:
        ConfigError: a variant that our model does not compute.
    """
    aspect, merge = config.get("image_aspect_ratio"), config.get("mm_patch_merge_type") or "flat"
    resampler, tiled = config.get("mm_resampler_type"), "anyres" in str(aspect)
    reasons = [
        (
            (aspect != "anyres" or merge != "spatial_unpad") if tiled else merge != "flat",
            f"has image_aspect_ratio={aspect} with mm_patch_merge_type={merge}; of pictures in tiles, anyres with "
            "spatial_unpad can be converted, as LLaVA-NeXT's models of January 2024 have it",
        ),
        (
            config.get("mm_use_im_start_end"),
            "has images between <im_start> and <im_end>, which no template writes here",
        ),
        (resampler is not None, f"has a resampler ({resampler}) before its projector, which mmlab does not have"),
        (config.get("s2"), "reads its vision tower at several scales (S2), which mmlab's encoders do not"),
        (config.get("quantization_config"), "has quantized weights; convert the checkpoint that they were made from"),
    ]
    if reason := next((reason for applies, reason in reasons if applies), None):
        raise ConfigError(f"{path} cannot be converted: it {reason}.")
    kind = config.get("mm_projector_type") or "linear"
    if re.fullmatch(r"linear|mlp\d+x_gelu", kind) is None:
        raise ConfigError(f"{path} has a projector of the type '{kind}'; linear and mlp2x_gelu can be converted.")
    tower = config["mm_vision_tower"]
    return {
        "language": _language_config(path, config),
        "vision_source": tower if isinstance(tower, str) else None,
        "feature_layer": config.get("mm_vision_select_layer", -2),
        "features": config.get("mm_vision_select_feature", "patch"),
        "aspect": None if tiled else "pad" if aspect == "pad" else "crop",
        # LLaVA states width and height.
        "pinpoints": [pair[::-1] for pair in pinpoints(path, config.get("image_grid_pinpoints"))] if tiled else [],
        "base": config.get("_name_or_path"),
    }


def pinpoints(path: Path, stated: Any) -> list[list[int]]:
    """The pairs of `image_grid_pinpoints` in a config, which some versions state as text."""
    try:
        grids = json.loads(stated.replace("(", "[").replace(")", "]")) if isinstance(stated, str) else stated
        return [[int(first), int(second)] for first, second in grids]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} has image_grid_pinpoints={stated}; pairs of sides in pixels can be converted, such as "
            "[[336, 672], [672, 336]]."
        ) from error


def _language_config(path: Path, config: Mapping[str, Any]) -> PretrainedConfig:
    """The config of the language model inside LLaVA's: LlavaMistralForCausalLM is a mistral.

    Raises:
        ConfigError: transformers has no such causal language model.
    """
    classes = config.get("architectures") or []
    match = re.fullmatch(r"Llava(\w+)ForCausalLM", classes[0]) if classes else None
    kind = match[1].lower() if match else str(config.get("model_type", "")).removeprefix("llava").strip("_") or "llama"
    kind = FAMILIES.get(kind, kind)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        name, hint = (
            classes[0] if classes else config.get("model_type"),
            nearest(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        )
        raise ConfigError(f"{path} is a {name}, and transformers has no causal language model '{kind}'.{hint}")
    return part_config(path, kind, {key: value for key, value in config.items() if not key.startswith(OWN_FIELDS)})


def split_own(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors of LLaVA's own layout by part, whatever wrapped them when they were saved."""
    weights: dict[str, dict[str, Tensor]] = {"language": {}, "connector": {}, "vision": {}, "newline": {}}
    for name, tensor in tensors.items():
        if name.endswith(BUFFERS):
            continue
        if match := re.search(r"(?:^|\.)mm_projector\.(?:(\d+)\.)?(weight|bias)$", name):
            ours = f"layers.{match[1]}.{match[2]}" if match[1] else f"proj.{match[2]}"
            weights["connector"][ours] = tensor
        elif match := re.search(r"(?:^|\.)vision_tower\.vision_tower\.(.+)$", name):
            weights["vision"][match[1]] = tensor
        elif re.search(r"(?:^|\.)image_newline$", name):
            weights["newline"]["feature"] = tensor
        else:
            weights["language"][re.sub(r"^(base_model\.model\.)", "", name)] = tensor
    return weights


def read_projector(path: Path) -> LlavaCheckpoint:
    """A file with a projector alone: LLaVA's `mm_projector.bin`, with its config beside it, or one of MiniGPT-4."""
    tensors = read_weights(path)
    if any(name.endswith("llama_proj.weight") for name in tensors):
        connector = {
            f"proj.{name.rpartition('.')[2]}": value for name, value in tensors.items() if "llama_proj." in name
        }
        return LlavaCheckpoint(path, "connector", "MiniGPT-4's", weights={"connector": connector})
    config = read_json(path.parent / "config.json") or {}
    connector = split_own(tensors)["connector"]
    settings = _own_settings(path.parent, config) if "mm_vision_tower" in config else {}
    checkpoint = LlavaCheckpoint(path, "connector", "LLaVA's projector", **settings)
    if checkpoint.pinpoints:
        raise ConfigError(
            f"{path} cannot be converted: it was trained on pictures in tiles (image_aspect_ratio=anyres), and a "
            "projector alone lacks the newline that ends their rows; convert the whole model."
        )
    checkpoint.weights = {"connector": connector}
    if not connector:
        contents = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise ConfigError(f"{path} has no projector of LLaVA or MiniGPT-4; it contains {contents}.")
    return checkpoint


def read_lora(path: Path, config: dict[str, Any] | None) -> LlavaCheckpoint:
    """LLaVA's LoRA training: an adapter of the language model, and the projector beside it."""
    if config is None or "mm_vision_tower" not in config:
        raise ConfigError(f"{path} is an adapter, but not one of LLaVA: it has no config.json with mm_vision_tower.")
    missing = [name for name in (EXTRA, "adapter_model.bin") if not (path / name).is_file()]
    adapters = [path / name for name in ADAPTERS if (path / name).is_file()]
    if not adapters or EXTRA in missing:
        raise ConfigError(f"{path} is not complete: it has no {missing[0]}.")
    adapter = read_json(path / "adapter_config.json") or {}
    if lacking := [key for key in ("r", "lora_alpha") if key not in adapter]:
        raise ConfigError(f"{path / 'adapter_config.json'} has no {lacking[0]}, so it is not LoRA's.")
    checkpoint = LlavaCheckpoint(path, "lora", "LLaVA's LoRA", **_own_settings(path, config))
    checkpoint.base = adapter.get("base_model_name_or_path") or checkpoint.base
    checkpoint.weights = split_own(read_weights(path / EXTRA))
    checkpoint.adapter = (read_weights(adapters[0]), adapter)
    matrices_of(*checkpoint.adapter, path)  # refused before anything is written
    require(checkpoint, "connector", *(["newline"] if checkpoint.pinpoints else []))
    return checkpoint
