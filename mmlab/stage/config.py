"""Settings of the stages (conf/stage): which parts are trained, from which runs they start, and the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING, OmegaConf

from mmlab.config.fields import Settings, choice, entries, number
from mmlab.data.class_texts import check_prompt
from mmlab.data.config import ImageDataConfig, ImageTextDataConfig, Prompt
from mmlab.training.config import LoRAConfig

DISTANCES = ("l1", "l2")


@dataclass
class StageConfig(Settings):
    """Which parts are trained, and from which earlier runs they start."""

    # A sample's loss depends on the others of its micro-batch: data.micro_batch is then part of what a run computes.
    # The number of devices is not: it spreads the same micro-batches.
    compares_samples: ClassVar[bool] = False
    # How its model draws pictures: from "noise" (takes a process and a sampler of that kind), by "codes" (a sampler of
    # codes), or not at all.
    draws_from: ClassVar[str | None] = None
    # The data that its batches are made of; None: any.
    reads: ClassVar[type | None] = ImageTextDataConfig
    _target_: str = MISSING
    trainable: list[str] = MISSING  # names of the model's parts, or dotted names inside a part
    lora: dict[str, Any] = entries(LoRAConfig)  # trained parts of which only an adapter is trained, by name
    init_from: list[str] = field(default_factory=list)  # names or folders of earlier runs; of a part, the last one wins


@dataclass
class NextTokenStageConfig(StageConfig):
    prompt: Prompt = field(default_factory=Prompt)  # the form in which samples become token sequences
    feature_cache_mb: int = number(0, at_least=0)  # memory for features of a frozen vision encoder (and Q-Former)


@dataclass
class ProjectorAlignmentConfig(NextTokenStageConfig):
    _target_: str = "mmlab.stage.vision_language.ProjectorAlignment"


@dataclass
class EndToEndFinetuningConfig(NextTokenStageConfig):
    _target_: str = "mmlab.stage.vision_language.EndToEndFinetuning"


@dataclass
class QFormerAlignmentConfig(NextTokenStageConfig):
    _target_: str = "mmlab.stage.vision_language.QFormerAlignment"


@dataclass
class LanguagePretrainingConfig(NextTokenStageConfig):
    _target_: str = "mmlab.stage.next_token.LanguagePretraining"


@dataclass
class PairStageConfig(StageConfig):
    """Of stages that compare the images of a micro-batch with its captions."""

    compares_samples: ClassVar[bool] = True
    # The caption of a sample that has a class and no caption, such as 'a photo of a {}.'; null: such a sample is bad.
    class_prompt: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_prompt is not None:
            check_prompt(self.class_prompt, "stage.class_prompt")


@dataclass
class ContrastivePretrainingConfig(PairStageConfig):
    _target_: str = "mmlab.stage.contrastive.ContrastivePretraining"


@dataclass
class QFormerPretrainingConfig(PairStageConfig):
    _target_: str = "mmlab.stage.qformer_pretraining.QFormerPretraining"


@dataclass
class AutoencoderTrainingConfig(StageConfig):
    # By the discriminator's batch norms and the adaptive weight.
    compares_samples: ClassVar[bool] = True
    reads: ClassVar[type | None] = ImageDataConfig
    _target_: str = "mmlab.stage.autoencoder_training.AutoencoderTraining"
    # sum: over an image's values, then the mean over images (latent diffusion; the perceptual distance counts for every
    # pixel value); mean: over values too (VQGAN). A kl_weight w of sum is w * (latent values / pixel values) of mean.
    reduction: str = choice("sum", "mean")
    pixel: str = choice(*DISTANCES)  # distance
    perceptual_weight: float = number(1.0, at_least=0)
    kl_weight: float = number(1e-6, at_least=0)
    codebook_weight: float = number(1.0, at_least=0)
    adversarial_weight: float | None = number(0.5, at_least=0)  # times the adaptive weight; 0 or null: no discriminator
    adversarial_start: int = number(50001, at_least=0)  # optimizer steps before the discriminator runs

    @staticmethod
    def apply_command_line(node: Any, choices: Mapping[str, str | None], overrides: Sequence[str]) -> None:
        """Leave the discriminator out of the model if the loss does not have it."""
        model: Any = node._get_parent().get("model")
        if node.adversarial_weight or not OmegaConf.is_dict(model) or OmegaConf.is_missing(node, "trainable"):
            return
        node.adversarial_weight, model.discriminator = 0.0, None
        node.trainable = [name for name in node.trainable if name.split(".")[0] != "discriminator"]


@dataclass
class LatentDiffusionConfig(StageConfig):
    draws_from: ClassVar[str] = "noise"
    reads: ClassVar[type | None] = ImageDataConfig
    _target_: str = "mmlab.stage.latent_diffusion.LatentDiffusion"
    loss: str = choice(*DISTANCES, default="l2")  # l1: latent diffusion's LSUN-Churches model
    # With model.alignment: weight of the similarity between hidden tokens and a vision encoder's features (REPA's 0.5).
    alignment_weight: float = number(0.5, above=0)
    # Optimizer steps after which it is left out and the encoder no longer run; None: never. In long runs alignment
    # comes to hurt (HASTE, arXiv 2505.16792).
    alignment_stop: int | None = number(None, above=0)

    @staticmethod
    def apply_command_line(node: Any, choices: Mapping[str, str | None], overrides: Sequence[str]) -> None:
        """Train the alignment and the uncertainty, if the model has them."""
        model: Any = node._get_parent().get("model")
        if not OmegaConf.is_dict(model) or OmegaConf.is_missing(node, "trainable"):
            return
        for part in ("alignment", "uncertainty"):
            if model.get(part) is not None and part not in node.trainable:
                node.trainable = [*node.trainable, part]


@dataclass
class CodePriorConfig(StageConfig):
    draws_from: ClassVar[str] = "codes"
    reads: ClassVar[type | None] = ImageDataConfig
    _target_: str = "mmlab.stage.code_prior.CodePrior"
    # Share of the codes that are read as they are; the others are replaced by random ones, so that the prior
    # learns to continue after its own mistakes. All codes are predicted.
    pkeep: float = number(1.0, at_least=0, at_most=1)
