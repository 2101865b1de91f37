"""The dataclasses of conf/stage: what learns, from what, with which prompt."""

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from mmlab.config.fields import choice, number


@dataclass
class PromptConfig:
    template: str = "v1"
    pictures: str = choice("tokens", "text", "scattered", "none")  # what stands for a picture
    supervise: str = choice("answers", "all")
    system: str | None = None  # None: the template's own
    turns: str = "auto"
    places: int = number(64, above=0)  # of a scattered caption
    requests: str = choice("llava", "minigpt4")  # whose questions ask for a caption
    captions: str = choice("raw", "blip")


@dataclass
class StageConfig:
    """What learns, and from which earlier runs it starts."""

    # A sample's loss depends on the others of its micro-batch: data.micro_batch is then part of what a run computes.
    # The number of devices is not: it spreads the same micro-batches.
    compares_samples: ClassVar[bool] = False
    _target_: str = MISSING
    trainable: list[str] = MISSING  # names of the model's parts
    init_from: list[str] = field(default_factory=list)  # names or folders of earlier runs


@dataclass
class VisionLanguageStageConfig(StageConfig):
    prompt: PromptConfig = field(default_factory=PromptConfig)
    feature_cache_mb: int = number(0, at_least=0)  # memory for features of a frozen vision encoder


@dataclass
class AlignConfig(VisionLanguageStageConfig):
    _target_: str = "mmlab.stage.vision_language.ProjectorAlignment"


@dataclass
class FinetuneConfig(VisionLanguageStageConfig):
    _target_: str = "mmlab.stage.vision_language.EndToEndFinetuning"


@dataclass
class QFormerAlignmentConfig(VisionLanguageStageConfig):
    _target_: str = "mmlab.stage.vision_language.QFormerAlignment"


@dataclass
class ContrastiveConfig(StageConfig):
    compares_samples: ClassVar[bool] = True
    _target_: str = "mmlab.stage.contrastive.ContrastivePretraining"


@dataclass
class QFormerPretrainingConfig(StageConfig):
    compares_samples: ClassVar[bool] = True
    _target_: str = "mmlab.stage.qformer_pretraining.QFormerPretraining"


@dataclass
class LanguagePretrainingConfig(VisionLanguageStageConfig):
    _target_: str = "mmlab.stage.next_token.LanguagePretraining"
