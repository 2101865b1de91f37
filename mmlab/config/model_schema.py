"""The dataclasses of conf/model and its parts."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from mmlab.config.fields import choice, number, section


@dataclass
class HardwareConfig:
    """Where a trained model runs."""

    accelerator: str = choice("auto", "cpu", "gpu", "cuda", "mps")
    precision: str = choice("auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")


@dataclass
class VisionConfig:
    _target_: str = "mmlab.model.vision.VisionEncoder"
    source: str | None = None  # hub name or local folder
    init: str = choice("pretrained", "random")
    architecture: dict[str, Any] = field(default_factory=dict)  # transformers config fields, with model_type
    feature_layer: int = -2  # index into the hidden states; LLaVA reads the layer before the last
    features: str = choice("patch", "cls_patch")
    image_mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])  # CLIP's
    image_std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])


@dataclass
class LanguageConfig:
    _target_: str = "mmlab.model.language.LanguageModel"
    source: str | None = None  # hub name or local folder
    init: str = choice("pretrained", "random")
    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None  # None: the source's own
    attention: str = "sdpa"


@dataclass
class MLPConnectorConfig:
    _target_: str = "mmlab.model.connector.MLPConnector"
    _partial_: bool = True  # the model gives both widths
    depth: int = number(2, above=0)


@dataclass
class LinearConnectorConfig:
    _target_: str = "mmlab.model.connector.LinearConnector"
    _partial_: bool = True


@dataclass
class VisionLanguageConfig:
    # The names that stage.trainable may take.
    parts: ClassVar[tuple[str, ...]] = ("vision", "connector", "language")
    _target_: str = "mmlab.model.vlm.VisionLanguageModel"
    vision: Any = section("model/vision")
    connector: Any = section("model/connector")
    language: Any = section("model/language")


@dataclass
class QFormerConfig:
    _target_: str = "mmlab.model.qformer.QFormer"
    _partial_: bool = True  # the model gives the vision width
    source: str | None = None  # hub name or local folder of a BLIP-2 checkpoint
    init: str = choice("pretrained", "random")
    architecture: dict[str, Any] = field(default_factory=dict)  # fields of transformers' Blip2QFormerConfig
    queries: int = number(32, above=0)


@dataclass
class QFormerVisionLanguageConfig(VisionLanguageConfig):
    parts: ClassVar[tuple[str, ...]] = ("vision", "qformer", "connector", "language")
    qformer: Any = section("model/qformer")


@dataclass
class ImageTextQFormerConfig:
    parts: ClassVar[tuple[str, ...]] = ("vision", "qformer", "words", "contrast", "match")
    _target_: str = "mmlab.model.image_text_qformer.ImageTextQFormer"
    vision: Any = section("model/vision")
    qformer: Any = section("model/qformer")
    tokenizer: str = MISSING  # hub name or local folder
    width: int = number(256, above=0)  # in which pictures and texts are compared


@dataclass
class TextTowerConfig:
    _target_: str = "mmlab.model.dual_encoder.TextEncoder"
    source: str | None = None
    init: str = choice("pretrained", "random")
    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None


@dataclass
class DualEncoderConfig:
    parts: ClassVar[tuple[str, ...]] = ("vision", "text", "vision_head", "text_head", "similarity")
    _target_: str = "mmlab.model.dual_encoder.DualEncoder"
    vision: Any = section("model/vision")
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    width: int = number(128, above=0)


@dataclass
class LanguageOnlyConfig:
    parts: ClassVar[tuple[str, ...]] = ("language",)
    _target_: str = "mmlab.model.language.LanguageOnly"
    language: Any = section("model/language")
