"""The dataclasses of image generation: first stages, denoisers, conditioners, processes, samplers, and their data."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from mmlab.config.fields import choice, number, section
from mmlab.config.stage_schema import StageConfig


@dataclass
class IdentityConfig:
    """Pixel space: the latents are the pixels."""

    _target_: str = "mmlab.model.first_stage.Identity"


@dataclass
class KLAutoencoderConfig:
    _target_: str = "mmlab.model.autoencoder.KLAutoencoder"
    source: str | None = None  # hub name or local folder of a diffusers AutoencoderKL
    init: str = choice("pretrained", "random")
    architecture: dict[str, Any] = field(default_factory=dict)  # diffusers AutoencoderKL fields


@dataclass
class QuantizerConfig:
    _target_: str = "mmlab.model.quantizer.VectorQuantizer"
    codes: int = number(1024, above=1)
    width: int = number(4, above=0)  # of a code
    beta: float = number(0.25, at_least=0)  # weight of the commitment term
    normalize: bool = True  # compare codes on the unit sphere
    revive_after: int | None = number(None, above=0)  # steps without use; None: never
    ema: float | None = number(None, at_least=0, at_most=1)  # codes follow their latents; None: they learn by gradient
    legacy: bool = False  # beta on the codebook term, as in released checkpoints


@dataclass
class GumbelQuantizerConfig:
    _target_: str = "mmlab.model.gumbel_quantizer.GumbelQuantizer"
    codes: int = number(8192, above=1)
    width: int = number(256, above=0)  # of a code
    kl_weight: float = number(5e-4, at_least=0)
    temperature: float = number(1.0, above=0)
    last_temperature: float | None = number(None, above=0)  # None: the first one, always
    anneal_steps: int = number(150000, above=0)


@dataclass
class VQAutoencoderConfig:
    _target_: str = "mmlab.model.autoencoder.VQAutoencoder"
    architecture: dict[str, Any] = field(default_factory=dict)  # of diffusers' Encoder and Decoder
    quantizer: Any = field(default_factory=QuantizerConfig)
    source: str | None = None  # folder of a trained one: <run>/artifacts/first_stage


@dataclass
class GumbelAutoencoderConfig(VQAutoencoderConfig):
    quantizer: Any = field(default_factory=GumbelQuantizerConfig)


@dataclass
class PatchDiscriminatorConfig:
    _target_: str = "mmlab.model.discriminator.PatchDiscriminator"
    layers: int = number(3, above=0)
    width: int = number(64, above=0)


@dataclass
class LPIPSConfig:
    _target_: str = "mmlab.model.perceptual.LPIPS"
    source: str | None = None  # a safetensors file of VGG16 and the linear heads


@dataclass
class StandInConfig:
    """A perceptual distance that needs no download; not LPIPS."""

    _target_: str = "mmlab.model.perceptual.StandIn"


@dataclass
class AutoencoderModelConfig:
    parts: ClassVar[tuple[str, ...]] = ("first_stage", "discriminator", "perceptual")
    _target_: str = "mmlab.model.autoencoder.AutoencoderModel"
    first_stage: Any = section("model/first_stage")
    discriminator: Any = section("model/discriminator")
    perceptual: Any = section("model/perceptual")


@dataclass
class NoConditionConfig:
    _target_: str = "mmlab.model.conditioner.NoCondition"


@dataclass
class ClassConditionConfig:
    _target_: str = "mmlab.model.conditioner.ClassCondition"
    classes: Any = None  # how many, or their names
    width: int = number(256, above=0)
    dropout: float = number(0.1, at_least=0, at_most=1)
    as_context: bool = False  # for cross-attention, instead of beside the time


@dataclass
class TextConditionConfig:
    _target_: str = "mmlab.model.conditioner.TextCondition"
    source: str | None = None
    init: str = choice("pretrained", "random")
    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    max_length: int = number(77, above=0)
    dropout: float = number(0.1, at_least=0, at_most=1)
    hide_padding: bool = False  # from the encoder's attention and the denoiser's; pipelines of Stable Diffusion cannot


@dataclass
class UNetConfig:
    _target_: str = "mmlab.model.denoiser.UNet"
    _partial_: bool = True  # the model gives channels and the condition's widths
    architecture: dict[str, Any] = field(default_factory=dict)  # diffusers UNet2DModel or UNet2DConditionModel fields


@dataclass
class DiTConfig:
    _target_: str = "mmlab.model.dit.DiT"
    _partial_: bool = True
    depth: int = number(12, above=0)
    width: int = number(384, above=0)
    heads: int = number(6, above=0)
    patch: int = number(2, above=0)


@dataclass
class DiffusionModelConfig:
    parts: ClassVar[tuple[str, ...]] = ("first_stage", "conditioner", "denoiser")
    _target_: str = "mmlab.model.denoiser.DiffusionModel"
    first_stage: Any = section("model/first_stage")
    conditioner: Any = section("model/conditioner")
    denoiser: Any = section("model/denoiser")


@dataclass
class AutoencoderTrainingConfig(StageConfig):
    """Every weight stands beside the reduction that it belongs to."""

    # By the discriminator's batch norms and the adaptive weight.
    compares_samples: ClassVar[bool] = True
    _target_: str = "mmlab.stage.autoencoder.AutoencoderTraining"
    # sum: over the values of a picture, divided by the pictures (latent diffusion); mean: over values (VQGAN).
    reduction: str = choice("sum", "mean")
    pixel: str = choice("l1", "l2")
    perceptual_weight: float = number(1.0, at_least=0)
    kl_weight: float = number(1e-6, at_least=0)
    codebook_weight: float = number(1.0, at_least=0)
    adversarial_weight: float = number(0.5, at_least=0)  # times the adaptive weight
    adversarial_start: int = number(50001, at_least=0)  # optimizer steps before the discriminator runs


@dataclass
class LatentDiffusionConfig(StageConfig):
    has_process: ClassVar[bool] = True
    _target_: str = "mmlab.stage.latent_diffusion.LatentDiffusion"
    loss: str = choice("l2", "l1")


@dataclass
class DiffusionProcessConfig:
    _target_: str = "mmlab.diffusion.process.Diffusion"
    schedule: str = choice("linear", "scaled_linear", "cosine")
    timesteps: int = number(1000, above=1)
    target: str = choice("epsilon", "x0", "v")
    beta_start: float | None = None
    beta_end: float | None = None
    zero_terminal_snr: bool = False
    min_snr_gamma: float | None = number(None, above=0)


@dataclass
class FlowMatchingConfig:
    _target_: str = "mmlab.diffusion.flow.FlowMatching"
    density: str = choice("uniform", "logit_normal")
    shift: float = number(1.0, above=0)
    target: str = choice("v", "x0")


@dataclass
class GuidanceConfig:
    _target_: str = "mmlab.diffusion.guidance.Guidance"
    scale: float = number(1.0, at_least=0)
    interval: list[float] | None = None  # lowest and highest time within which to guide
    rescale: float = number(0.0, at_least=0, at_most=1)


@dataclass
class ClipConfig:
    _target_: str = "mmlab.diffusion.guidance.Clip"
    limit: float = number(1.0, above=0)
    percentile: float | None = number(None, above=0, at_most=1)


@dataclass
class SamplerConfig:
    _target_: str = "mmlab.diffusion.samplers.Sampler"
    name: str = choice("ddim", "ddpm", "dpmpp_2m", "euler", "heun")
    steps: int = number(50, above=0)
    spacing: str = choice("trailing", "linspace", "leading")
    clip: Any = None  # bounds for pixels; latents have none
    eta: float | None = number(None, at_least=0, at_most=1)
    variance: str | None = None
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
