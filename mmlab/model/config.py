"""Settings of models and their parts (conf/model)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from mmlab.config.fields import Settings, choice, number, section


@dataclass
class VisionEncoderConfig(Settings):
    _target_: str = "mmlab.model.vision.VisionEncoder"
    source: str | None = None  # hub name or local folder
    init: str = choice("pretrained", "random")
    architecture: dict[str, Any] = field(default_factory=dict)  # transformers config fields, with model_type
    feature_layer: int = -2  # index into the hidden states; LLaVA reads the layer before the last
    features: str = choice("patch", "cls_patch")
    image_mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])  # CLIP's
    image_std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])


@dataclass
class LanguageModelConfig(Settings):
    _target_: str = "mmlab.model.language.LanguageModel"
    source: str | None = None  # hub name or local folder
    init: str = choice("pretrained", "random")
    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None  # None: the source's own
    attention: str = "sdpa"


@dataclass
class LanguageOnlyConfig(Settings):
    kind: ClassVar[str] = "writes"
    parts: ClassVar[tuple[str, ...]] = ("language",)
    _target_: str = "mmlab.model.language.LanguageOnly"
    language: Any = section("model/language")


@dataclass
class MLPConnectorConfig(Settings):
    _target_: str = "mmlab.model.connector.MLPConnector"
    _partial_: bool = True  # the model gives both widths
    depth: int = number(2, above=0)


@dataclass
class LinearConnectorConfig(Settings):
    _target_: str = "mmlab.model.connector.LinearConnector"
    _partial_: bool = True


@dataclass
class QFormerConfig(Settings):
    _target_: str = "mmlab.model.qformer.QFormer"
    _partial_: bool = True  # the model gives the vision width
    source: str | None = None  # hub name or local folder of a BLIP-2 checkpoint
    init: str = choice("pretrained", "random")
    architecture: dict[str, Any] = field(default_factory=dict)  # fields of transformers' Blip2QFormerConfig
    queries: int = number(32, above=0)


@dataclass
class VisionLanguageModelConfig(Settings):
    # The names that stage.trainable may take.
    kind: ClassVar[str] = "answers"
    parts: ClassVar[tuple[str, ...]] = ("vision", "connector", "language")
    _target_: str = "mmlab.model.vlm.VisionLanguageModel"
    vision: Any = section("model/vision")
    connector: Any = section("model/connector")
    language: Any = section("model/language")
    qformer: Any = section("model/qformer", default=None)  # between vision encoder and connector


@dataclass
class ImageTextQFormerConfig(Settings):
    kind: ClassVar[str] = "compares"
    parts: ClassVar[tuple[str, ...]] = ("vision", "qformer", "words", "contrast", "match")
    _target_: str = "mmlab.model.image_text_qformer.ImageTextQFormer"
    vision: Any = section("model/vision")
    qformer: Any = section("model/qformer")
    tokenizer: str = MISSING  # hub name or local folder
    width: int = number(256, above=0)  # in which pictures and texts are compared


@dataclass
class TextEncoderConfig(Settings):
    _target_: str = "mmlab.model.dual_encoder.TextEncoder"
    source: str | None = None
    init: str = choice("pretrained", "random")
    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None


@dataclass
class DualEncoderConfig(Settings):
    kind: ClassVar[str] = "compares"
    parts: ClassVar[tuple[str, ...]] = ("vision", "text", "vision_head", "text_head", "similarity")
    _target_: str = "mmlab.model.dual_encoder.DualEncoder"
    vision: Any = section("model/vision")
    text: Any = section(default=TextEncoderConfig)
    width: int = number(128, above=0)


@dataclass
class IdentityConfig(Settings):
    """Pixel space: the latents are the pixels."""

    _target_: str = "mmlab.model.first_stage.Identity"


@dataclass
class KLAutoencoderConfig(Settings):
    _target_: str = "mmlab.model.autoencoder.KLAutoencoder"
    source: str | None = None  # hub name or local folder of a diffusers AutoencoderKL
    init: str = choice("pretrained", "random")
    architecture: dict[str, Any] = field(default_factory=dict)  # diffusers AutoencoderKL fields


@dataclass
class VectorQuantizerConfig(Settings):
    _target_: str = "mmlab.model.quantizer.VectorQuantizer"
    codes: int = number(1024, above=1)
    width: int = number(4, above=0)  # of a code
    beta: float = number(0.25, at_least=0)  # weight of the commitment term
    normalize: bool = True  # compare codes on the unit sphere
    revive_after: int | None = number(None, above=0)  # steps without use; None: never
    ema: float | None = number(None, at_least=0, below=1)  # codes follow their latents; None: they learn by gradient
    legacy: bool = False  # beta on the codebook term, as in released checkpoints


@dataclass
class GumbelQuantizerConfig(Settings):
    _target_: str = "mmlab.model.gumbel_quantizer.GumbelQuantizer"
    codes: int = number(8192, above=1)
    width: int = number(256, above=0)  # of a code
    kl_weight: float = number(5e-4, at_least=0)
    temperature: float = number(1.0, above=0)
    last_temperature: float | None = number(None, above=0)  # None: the first one, always
    anneal_steps: int = number(150000, above=0)


@dataclass
class VQAutoencoderConfig(Settings):
    _target_: str = "mmlab.model.autoencoder.VQAutoencoder"
    architecture: dict[str, Any] = field(default_factory=dict)  # of diffusers' Encoder and Decoder
    quantizer: Any = section("model/first_stage/quantizer")
    source: str | None = None  # folder of a trained one: <run>/artifacts/first_stage


@dataclass
class PatchDiscriminatorConfig(Settings):
    _target_: str = "mmlab.model.discriminator.PatchDiscriminator"
    layers: int = number(3, above=0)
    width: int = number(64, above=0)


@dataclass
class LPIPSConfig(Settings):
    _target_: str = "mmlab.model.perceptual.LPIPS"
    source: str | None = None  # a safetensors file of VGG16 and the linear heads


@dataclass
class StandInConfig(Settings):
    """A perceptual distance that needs no download; not LPIPS."""

    _target_: str = "mmlab.model.perceptual.StandIn"


@dataclass
class AutoencoderModelConfig(Settings):
    kind: ClassVar[str] = "reconstructs"
    parts: ClassVar[tuple[str, ...]] = ("first_stage", "discriminator", "perceptual")
    _target_: str = "mmlab.model.autoencoder.AutoencoderModel"
    first_stage: Any = section("model/first_stage")
    discriminator: Any = section("model/discriminator")
    perceptual: Any = section("model/perceptual")


@dataclass
class NoConditionConfig(Settings):
    _target_: str = "mmlab.model.conditioner.NoCondition"


@dataclass
class ClassConditionConfig(Settings):
    _target_: str = "mmlab.model.conditioner.ClassCondition"
    classes: Any = None  # how many, or their names
    width: int = number(256, above=0)
    dropout: float = number(0.1, at_least=0, at_most=1)
    as_context: bool = False  # for cross-attention, instead of beside the time


@dataclass
class TextConditionConfig(Settings):
    _target_: str = "mmlab.model.conditioner.TextCondition"
    source: str | None = None
    init: str = choice("pretrained", "random")
    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    max_length: int = number(77, above=0)
    dropout: float = number(0.1, at_least=0, at_most=1)
    hide_padding: bool = False  # from the encoder's attention and the denoiser's; pipelines of Stable Diffusion cannot


@dataclass
class MapConditionConfig(Settings):
    _target_: str = "mmlab.model.conditioner.MapCondition"
    codes: int = number(MISSING, above=1)  # of the first stage of maps
    width: int = number(256, above=0)
    dropout: float = number(0.1, at_least=0, at_most=1)


@dataclass
class UNetConfig(Settings):
    _target_: str = "mmlab.model.denoiser.UNet"
    _partial_: bool = True  # the model gives channels and the condition's widths
    architecture: dict[str, Any] = field(default_factory=dict)  # diffusers UNet2DModel or UNet2DConditionModel fields


@dataclass
class DiTConfig(Settings):
    _target_: str = "mmlab.model.dit.DiT"
    _partial_: bool = True
    depth: int = number(12, above=0)
    width: int = number(384, above=0)
    heads: int = number(6, above=0)
    patch: int = number(2, above=0)


@dataclass
class DiffusionModelConfig(Settings):
    kind: ClassVar[str] = "draws"
    parts: ClassVar[tuple[str, ...]] = ("first_stage", "conditioner", "denoiser")
    _target_: str = "mmlab.model.denoiser.DiffusionModel"
    first_stage: Any = section("model/first_stage")
    conditioner: Any = section("model/conditioner")
    denoiser: Any = section("model/denoiser")


@dataclass
class CodeGPTConfig(Settings):
    _target_: str = "mmlab.model.code_gpt.CodeGPT"
    _partial_: bool = True  # the model gives the number of codes and the condition's widths
    side: int = number(16, above=0)  # codes along a side: data.size over the first stage's factor
    depth: int = number(12, above=0)
    width: int = number(768, above=0)
    heads: int = number(12, above=0)
    positions: str = choice("learned", "rotary")
    dropout: float = number(0.0, at_least=0, at_most=1)


@dataclass
class CodePriorModelConfig(Settings):
    kind: ClassVar[str] = "draws"
    parts: ClassVar[tuple[str, ...]] = ("first_stage", "map_stage", "conditioner", "prior")
    _target_: str = "mmlab.model.code_prior_model.CodePriorModel"
    first_stage: Any = section("model/first_stage")
    conditioner: Any = section("model/conditioner")
    prior: Any = section("model/prior")
    map_stage: Any = section("model/first_stage", default=None)  # encodes maps, for conditioner=map


@dataclass
class CodeSamplerConfig(Settings):
    writes_codes: ClassVar[bool] = True
    _target_: str = "mmlab.model.code_sampling.CodeSampler"
    temperature: float = number(1.0, at_least=0)  # 0: the likeliest code
    top_k: int | None = number(None, above=0)  # None: all
    top_p: float | None = number(None, above=0, at_most=1)  # None: all
    guidance: float = number(1.0, at_least=0)  # scale
