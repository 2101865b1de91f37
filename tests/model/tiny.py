"""Tiny parts with random weights."""

from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmlab.model.config import (
    ImageTextQFormerConfig,
    LanguageModelConfig,
    MLPConnectorConfig,
    QFormerConfig,
    VisionEncoderConfig,
)
from mmlab.model.connector import LinearConnector, MLPConnector
from mmlab.model.image_text_qformer import ImageTextQFormer
from mmlab.model.language import LanguageModel
from mmlab.model.qformer import QFormer
from mmlab.model.vision import VisionEncoder
from mmlab.model.vlm import VisionLanguageModel

Part = TypeVar("Part", bound=Any)

VISION = {
    "clip": {"model_type": "clip_vision_model", "intermediate_size": 48},
    "siglip": {"model_type": "siglip_vision_model", "intermediate_size": 48, "vision_use_head": False},
    "dinov2": {"model_type": "dinov2", "mlp_ratio": 2},
    "dinov2_registers": {"model_type": "dinov2_with_registers", "mlp_ratio": 2, "num_register_tokens": 2},
    # Its published initializer_range of 1e-10 would make all features alike.
    "blip2": {"model_type": "blip_2_vision_model", "intermediate_size": 48, "initializer_range": 0.02},
}
LANGUAGE = {
    "llama": {"model_type": "llama", "intermediate_size": 48, "max_position_embeddings": 128},
    "qwen2": {"model_type": "qwen2", "intermediate_size": 48, "num_key_value_heads": 1},
    "gpt2": {"model_type": "gpt2", "n_positions": 128, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}
UNMASKED = {"bloom": {"model_type": "bloom", "hidden_dropout": 0.0, "attention_dropout": 0.0}}
"""Language models that are not given the masks of packed rows."""


def pretrained(part: Part) -> Part:
    """A part with the weights of its source, in eval mode."""
    part.load_pretrained()
    return part.eval()


def vision(kind: str = "clip", **options) -> VisionEncoder:
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    return VisionEncoder(VisionEncoderConfig(init="random", architecture={**VISION[kind], **size}, **options))


def language(tokenizer: Path, kind: str = "llama") -> LanguageModel:
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LanguageModel(
        LanguageModelConfig(
            init="random", architecture={**{**LANGUAGE, **UNMASKED}[kind], **size}, tokenizer=str(tokenizer)
        )
    )


QFORMER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def qformer(vision_width: int = 32, queries: int = 5, text: bool = False) -> QFormer:
    return QFormer(QFormerConfig(init="random", architecture=QFORMER, queries=queries), vision_width, text)


def vlm(tokenizer: Path, eye: str = "clip", tongue: str = "llama", connector: str = "mlp") -> VisionLanguageModel:
    torch.manual_seed(0)
    joint = {"mlp": partial(MLPConnector, MLPConnectorConfig(depth=2)), "linear": LinearConnector}[connector]
    return VisionLanguageModel(vision(eye), joint, language(tokenizer, tongue)).eval()


def minigpt4(tokenizer: Path, tongue: str = "llama") -> VisionLanguageModel:
    """A model with a Q-Former, whose vision encoder is read as BLIP-2 reads it."""
    torch.manual_seed(0)
    eye = vision("blip2", feature_layer=-1, features="cls_patch")
    return VisionLanguageModel(eye, LinearConnector, language(tokenizer, tongue), qformer).eval()


def image_text_qformer(tokenizer: Path) -> ImageTextQFormer:
    torch.manual_seed(0)
    eye = vision("blip2", feature_layer=-1, features="cls_patch")
    return ImageTextQFormer(ImageTextQFormerConfig(tokenizer=str(tokenizer), width=16), eye, qformer).eval()
