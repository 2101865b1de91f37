"""Settings of the stages (conf/stage): what learns, from which runs it starts, and its loss."""

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from mmlab.config.fields import Settings, choice, number
from mmlab.data.config import Prompt


@dataclass
class StageConfig(Settings):
    """What learns, and from which earlier runs it starts."""

    # A sample's loss depends on the others of its micro-batch: data.micro_batch is then part of what a run computes.
    # The number of devices is not: it spreads the same micro-batches.
    compares_samples: ClassVar[bool] = False
    _target_: str = MISSING
    trainable: list[str] = MISSING  # names of the model's parts
    init_from: list[str] = field(default_factory=list)  # names or folders of earlier runs


@dataclass
class NextTokenStageConfig(StageConfig):
    prompt: Prompt = field(default_factory=Prompt)
    feature_cache_mb: int = number(0, at_least=0)  # memory for features of a frozen vision encoder


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
class ContrastivePretrainingConfig(StageConfig):
    compares_samples: ClassVar[bool] = True
    _target_: str = "mmlab.stage.contrastive.ContrastivePretraining"


@dataclass
class QFormerPretrainingConfig(StageConfig):
    compares_samples: ClassVar[bool] = True
    _target_: str = "mmlab.stage.qformer_pretraining.QFormerPretraining"


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
class CodePriorConfig(StageConfig):
    writes_codes: ClassVar[bool] = True
    _target_: str = "mmlab.stage.code_prior.CodePrior"
    pkeep: float = number(1.0, at_least=0, at_most=1)  # share of the codes that are read as they are
