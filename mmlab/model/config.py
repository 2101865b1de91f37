"""Settings of models and their parts (conf/model)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from mmlab.config.fields import Settings, choice, number, section

ANSWER_TOKENS = 256
"""Longest answer of `mmlab chat` and of an exported model."""


@dataclass
class PretrainedPartConfig(Settings):
    """A part that starts from a checkpoint, or from random weights."""

    _target_: str = MISSING
    source: str | None = None  # hub name or local folder; of a language model, also a GGUF file
    init: str = choice("pretrained", "random")  # pretrained: weights and architecture of the source
    # For init=random: fields of the transformers config, with model_type, or of the diffusers class.
    architecture: dict[str, Any] = field(default_factory=dict)


@dataclass
class PretrainedTextConfig(PretrainedPartConfig):
    tokenizer: str | None = None  # hub name or local folder; None: the source's own


@dataclass
class VisionEncoderConfig(PretrainedPartConfig):
    _target_: str = "mmlab.model.vision.VisionEncoder"
    # Index into the hidden states: 0 the embeddings, -1 the last layer's output. None: -2, or the last feature map of a
    # tower whose layers differ in resolution.
    feature_layer: int | None = None
    features: str = choice("patch", "cls_patch")  # cls_patch: with the class token in front
    # Of values in [0, 1]. None: those of the source's preprocessor_config.json, or else CLIP's.
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    # Pixels. None: the tower's own; another size needs a tower that interpolates its position embeddings.
    image_size: int | None = number(None, above=0)


@dataclass
class FusedVisionEncoderConfig(Settings):
    _target_: str = "mmlab.model.fused_vision.FusedVisionEncoder"
    first: Any = section("model/vision")
    second: Any = section("model/vision")


@dataclass
class LanguageModelConfig(PretrainedTextConfig):
    _target_: str = "mmlab.model.language.LanguageModel"
    # auto: the fastest that can run for a batch. varlen, flex, blocks: this one where it can run. Else an attention
    # implementation of transformers: sdpa (eager for models that do not have it) has a dense mask for packed rows.
    attention: str = "auto"
    # chunked: cross-entropy without all logits at once, where the output layer is a plain linear one. auto: from 16M
    # logits in a micro-batch on, if the output layer is frozen.
    loss: str = choice("auto", "chunked", "logits")
    # Store the weights of linear layers in 4 bits (QLoRA); they are not trained, so stage.lora adds an adapter.
    quantize: str | None = choice("nf4", default=None)


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
class FusedMLPConnectorConfig(Settings):
    _target_: str = "mmlab.model.connector.FusedMLPConnector"
    _partial_: bool = True  # the model gives both widths


@dataclass
class LinearConnectorConfig(Settings):
    _target_: str = "mmlab.model.connector.LinearConnector"
    _partial_: bool = True


@dataclass
class NewlineConfig(Settings):
    _target_: str = "mmlab.model.connector.Newline"
    _partial_: bool = True  # the model gives the width


@dataclass
class QFormerConfig(PretrainedPartConfig):
    """`source` is a BLIP-2 checkpoint, or a run's artifact."""

    _target_: str = "mmlab.model.qformer.QFormer"
    _partial_: bool = True  # the model gives the vision width
    queries: int = number(32, above=0)  # tokens per image


@dataclass
class VisionLanguageModelConfig(Settings):
    kind: ClassVar[str] = "answers"
    # The names that stage.trainable may take.
    parts: ClassVar[tuple[str, ...]] = ("vision", "qformer", "connector", "newline", "language")
    _target_: str = "mmlab.model.vlm.VisionLanguageModel"
    vision: Any = section("model/vision")
    connector: Any = section("model/connector")
    language: Any = section("model/language")
    qformer: Any = section("model/qformer", default=None)  # between vision encoder and connector
    newline: Any = section("model/newline", default=None)  # of pictures that are several tiles, data.aspect=anyres


@dataclass
class ImageTextQFormerConfig(Settings):
    kind: ClassVar[str] = "compares"
    parts: ClassVar[tuple[str, ...]] = ("vision", "qformer", "words", "contrast", "match")
    _target_: str = "mmlab.model.image_text_qformer.ImageTextQFormer"
    vision: Any = section("model/vision")
    qformer: Any = section("model/qformer")
    tokenizer: str = MISSING  # hub name or local folder; with [CLS] and [SEP], or tokens that begin and end a text
    width: int = number(256, above=0)  # of the space in which images and texts are compared


@dataclass
class TextEncoderConfig(PretrainedTextConfig):
    _target_: str = "mmlab.model.dual_encoder.TextEncoder"


@dataclass
class DualEncoderConfig(Settings):
    kind: ClassVar[str] = "compares"
    parts: ClassVar[tuple[str, ...]] = ("vision", "text", "vision_head", "text_head", "similarity")
    _target_: str = "mmlab.model.dual_encoder.DualEncoder"
    vision: Any = section("model/vision")
    text: Any = section(default=TextEncoderConfig)
    width: int = number(128, above=0)  # of the joint space


@dataclass
class IdentityConfig(Settings):
    """Pixel space: the latents are the pixels."""

    _target_: str = "mmlab.model.first_stage.Identity"


@dataclass
class KLAutoencoderConfig(PretrainedPartConfig):
    """Of diffusers' AutoencoderKL; its block types follow from `block_out_channels` unless given."""

    _target_: str = "mmlab.model.autoencoder.KLAutoencoder"


@dataclass
class VectorQuantizerConfig(Settings):
    _target_: str = "mmlab.model.quantizer.VectorQuantizer"
    codes: int = number(1024, above=1)
    width: int = number(4, above=0)  # of a code
    beta: float = number(0.25, at_least=0)  # weight of the commitment term
    normalize: bool = True  # compare latents and codes on the unit sphere
    # Every so many optimizer steps, codes that were unused since become latents of the current batch; None: never.
    revive_after: int | None = number(None, above=0)
    # Share of its old value that a code keeps per step as it follows its latents' mean; None: codes learn by gradient.
    ema: float | None = number(None, at_least=0, below=1)
    legacy: bool = False  # beta on the codebook term, as in the released checkpoints of VQGAN and latent diffusion


@dataclass
class GumbelQuantizerConfig(Settings):
    _target_: str = "mmlab.model.gumbel_quantizer.GumbelQuantizer"
    codes: int = number(8192, above=1)
    width: int = number(256, above=0)  # of a code
    kl_weight: float = number(5e-4, at_least=0)  # a mean over positions with the stage's reduction=mean
    temperature: float = number(1.0, above=0)  # of the softmax at the first step
    last_temperature: float | None = number(None, above=0)  # after anneal_steps, along a cosine; None: the first one
    anneal_steps: int = number(150000, above=0)  # optimizer steps


@dataclass
class VQAutoencoderConfig(Settings):
    _target_: str = "mmlab.model.autoencoder.VQAutoencoder"
    architecture: dict[str, Any] = field(default_factory=dict)  # AutoencoderKL's fields for encoder and decoder
    quantizer: Any = section("model/first_stage/quantizer")
    # Folder of a trained one, <run>/artifacts/first_stage, or hub name or folder of a diffusers VQModel, or of a
    # pipeline with one; None: random weights.
    source: str | None = None


@dataclass
class PatchDiscriminatorConfig(Settings):
    _target_: str = "mmlab.model.discriminator.PatchDiscriminator"
    layers: int = number(3, above=0)  # convolutions that halve the sides
    width: int = number(64, above=0)  # channels of the first; they double with each layer, up to 8 times


@dataclass
class LPIPSConfig(Settings):
    _target_: str = "mmlab.model.perceptual.LPIPS"
    source: str | None = None  # safetensors file of VGG16 and the linear heads, its folder, or its hub repository


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
    discriminator: Any = section("model/discriminator", default=None)  # None: the loss has none
    perceptual: Any = section("model/perceptual")


@dataclass
class NoConditionConfig(Settings):
    _target_: str = "mmlab.model.conditioner.NoCondition"


@dataclass
class ClassConditionConfig(Settings):
    _target_: str = "mmlab.model.conditioner.ClassCondition"
    classes: Any = None  # their number, or the list of their names in the order of their indices
    width: int = number(256, above=0)
    dropout: float = number(0.1, at_least=0, at_most=1)  # probability that training drops an image's condition
    as_context: bool = False  # one token for cross-attention, instead of a vector added to the time embedding
    source: str | None = None  # the denoiser's, if that has embeddings of these classes; None: random embeddings


@dataclass
class TextConditionConfig(PretrainedTextConfig):
    _target_: str = "mmlab.model.conditioner.TextCondition"
    max_length: int = number(77, above=0)  # tokens; shorter texts are padded, longer ones are cut
    dropout: float = number(0.1, at_least=0, at_most=1)
    hide_padding: bool = False  # mask padding in the encoder and the denoiser; Stable Diffusion's pipelines cannot


@dataclass
class MapConditionConfig(Settings):
    _target_: str = "mmlab.model.conditioner.MapCondition"
    codes: int = number(MISSING, above=1)  # of the maps' first stage
    width: int = number(256, above=0)
    dropout: float = number(0.1, at_least=0, at_most=1)


@dataclass
class UNetConfig(Settings):
    _target_: str = "mmlab.model.denoiser.UNet"
    _partial_: bool = True  # the model gives channels and the condition's widths
    # Hub name or folder of a diffusers UNet, or of a pipeline with one, whose weights and architecture it takes; None:
    # random weights.
    source: str | None = None
    # Fields of diffusers' UNet2DModel, or UNet2DConditionModel where the condition has a context; `attention_head_dim`
    # is the width of a head in the former, and the number of heads in the latter.
    architecture: dict[str, Any] = field(default_factory=dict)


@dataclass
class DiTConfig(Settings):
    _target_: str = "mmlab.model.dit.DiT"
    _partial_: bool = True
    source: str | None = None  # hub name or folder of a diffusers DiT of these sizes, or of its pipeline; None: random
    depth: int = number(12, above=0)
    width: int = number(384, above=0)  # a multiple of 4 and of heads
    heads: int = number(6, above=0)
    patch: int = number(2, above=0)  # side of a patch


@dataclass
class AlignmentConfig(Settings):
    _target_: str = "mmlab.model.alignment.Alignment"
    _partial_: bool = True  # the model gives both widths
    # Blocks of a DiT before the hidden tokens that are aligned; None: two sevenths of them, the paper's 8 of 28. Those
    # of a UNet are its middle block's, without a choice.
    depth: int | None = number(None, above=0)
    width: int = number(2048, above=0)  # of the projector's hidden layers


@dataclass
class NoiseUncertaintyConfig(Settings):
    _target_: str = "mmlab.model.uncertainty.NoiseUncertainty"
    features: int = number(128, above=0)  # of the noise level; EDM2's 128


@dataclass
class DiffusionModelConfig(Settings):
    kind: ClassVar[str] = "draws"
    parts: ClassVar[tuple[str, ...]] = ("first_stage", "conditioner", "denoiser", "alignment", "uncertainty")
    # Parts that only training uses, so that nothing else builds and reads them.
    training_only: ClassVar[tuple[str, ...]] = ("vision", "alignment", "uncertainty")
    _target_: str = "mmlab.model.denoiser.DiffusionModel"
    first_stage: Any = section("model/first_stage")
    conditioner: Any = section("model/conditioner")
    denoiser: Any = section("model/denoiser")
    vision: Any = section("model/vision", default=None)  # whose features the denoiser's are aligned with
    alignment: Any = section("model/alignment", default=None)  # None: trained without alignment
    # weighs the loss of each noise level in training; None: as the process does
    uncertainty: Any = section("model/uncertainty", default=None)


@dataclass
class CodeGPTConfig(Settings):
    _target_: str = "mmlab.model.code_gpt.CodeGPT"
    _partial_: bool = True  # the model gives the number of codes and the condition's widths
    side: int = number(16, above=0)  # codes along a side: data.size over the first stage's factor
    depth: int = number(12, above=0)
    width: int = number(768, above=0)  # a multiple of heads
    heads: int = number(12, above=0)
    positions: str = choice("learned", "rotary")  # rotary: by row and column (arXiv 2104.09864)
    dropout: float = number(0.0, at_least=0, at_most=1)  # of embeddings, attention and residual branches


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
    draws_from: ClassVar[str] = "codes"
    _target_: str = "mmlab.model.code_sampling.CodeSampler"
    temperature: float = number(1.0, at_least=0)  # logits are divided by it; 0: the likeliest code
    top_k: int | None = number(None, above=0)  # sample among the k likeliest codes; None: all
    # Sample among the likeliest codes that together reach this probability (arXiv 1904.09751, section 3.1); None: all.
    top_p: float | None = number(None, above=0, at_most=1)
    guidance: float = number(1.0, at_least=0)  # w in null + w · (conditional - null), on logits
