"""Settings of the callbacks that score and show what a run learns (conf/callbacks), and the scorers by name."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from mmlab.config.fields import Settings, choice, number
from mmlab.data.config import FLOOR

SCORERS = {
    "exact": "mmlab.evaluate.scores.scorers.exact",
    "vqa": "mmlab.evaluate.scores.vqa.vqa",
    # GQA's accuracy is exact match, as its evaluation splits it: by form, by meaning, and binary or open.
    "gqa": "mmlab.evaluate.scores.scorers.exact",
    "pope": "mmlab.evaluate.scores.yes_no.pope",
    "mme": "mmlab.evaluate.scores.yes_no.mme",
    "scienceqa": "mmlab.evaluate.scores.scienceqa_score.scienceqa",
    "captions": "mmlab.evaluate.scores.caption_scores.captions",
    "facts": "mmlab.evaluate.scores.scorers.facts",
}
"""Scorers by the name of their metric; see `scorer_named`."""
METRICS = tuple(SCORERS)


@dataclass
class DataReportCallbackConfig(Settings):
    _target_: str = "mmlab.evaluate.callbacks.data_report.DataReportCallback"
    budget: float = "${data.bad_budget}"  # type: ignore[assignment]  # share of samples that may be replaced
    floor: int = number(FLOOR, at_least=0)  # replaced samples that never stop a run


@dataclass
class SamplesConfig(Settings):
    """A sheet of fixed validation samples after validations."""

    _target_: str = MISSING
    count: int = number(8, above=0)  # samples on a sheet
    sheets: int = number(20, above=0)  # maximum number of sheets in a run, spread evenly; the last step always has one


@dataclass
class AnsweredSamplesConfig(SamplesConfig):
    _target_: str = "mmlab.evaluate.callbacks.sample_sheets.AnsweredSamples"
    max_new_tokens: int = number(32, above=0)  # longest answer


@dataclass
class GeneratedSamplesConfig(SamplesConfig):
    _target_: str = "mmlab.evaluate.callbacks.sample_sheets.GeneratedSamples"
    count: int = number(16, above=0)
    steps: int = number(50, above=0)  # maximum number of steps of a diffusion sampler, whatever the run's sampler has


@dataclass
class ReconstructedSamplesConfig(SamplesConfig):
    _target_: str = "mmlab.evaluate.callbacks.sample_sheets.ReconstructedSamples"


@dataclass
class AnswerQualityConfig(Settings):
    """A score of the model's answers at the end of a run."""

    _target_: str = "mmlab.evaluate.callbacks.quality.AnswerQuality"
    questions: str = MISSING  # folder of shards with questions
    metric: str = choice(*METRICS)
    template: str | None = None  # to ask in; null: the one that the run is trained with
    types: list[str] = field(default_factory=list)  # question types to score; empty: all
    limit: int | None = number(None, above=0)  # score at most this many questions
    # Questions that are also asked with blank pictures, for the baseline blind; 0: none; null: all.
    blind: int | None = number(500, at_least=0)
    batch_size: int = number(64, above=0)
    max_new_tokens: int = number(64, above=0)  # longest answer


@dataclass
class PictureUseConfig(Settings):
    """Whether a vision-language model uses its pictures, at the end of a run."""

    _target_: str = "mmlab.evaluate.callbacks.picture_use.PictureUse"
    questions: int = number(64, above=1)  # fixed validation questions; each is asked three times
    max_new_tokens: int = number(16, above=0)  # longest answer


@dataclass
class SampleQualityConfig(Settings):
    """FID and KID of samples at the end of a run."""

    _target_: str = "mmlab.evaluate.callbacks.quality.SampleQuality"
    # Network whose features are compared: a run of stage=contrastive, inception, or a pretrained vision encoder.
    features: str = MISSING
    pictures: str = MISSING  # folder of shards to compare with
    aspect: str = "${data.aspect}"  # how their images become square
    samples: int = number(1000, above=1)
    batch_size: int = number(64, above=0)
    root: str = "${run.root}"  # folder of the runs
