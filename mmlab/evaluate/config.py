"""Settings of the callbacks that score and show what a run learns (conf/callbacks), and the names of the scores."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from mmlab.config.fields import Settings, choice, number

METRICS = ("exact", "vqa", "gqa", "pope", "mme", "scienceqa", "captions", "facts")


@dataclass
class DataReportCallbackConfig(Settings):
    _target_: str = "mmlab.evaluate.callbacks.data_report.DataReportCallback"
    budget: float = "${data.bad_budget}"  # type: ignore[assignment]  # share of samples that may be replaced
    floor: int = number(10, at_least=0)  # replaced samples that never stop a run


@dataclass
class SamplesConfig(Settings):
    """A sheet of fixed validation samples after validations."""

    _target_: str = MISSING
    count: int = number(8, above=0)  # samples on a sheet
    sheets: int = number(20, above=0)  # spread over a run


@dataclass
class AnsweredSamplesConfig(SamplesConfig):
    _target_: str = "mmlab.evaluate.callbacks.sample_sheets.AnsweredSamples"
    max_new_tokens: int = number(32, above=0)  # of an answer


@dataclass
class GeneratedSamplesConfig(SamplesConfig):
    _target_: str = "mmlab.evaluate.callbacks.sample_sheets.GeneratedSamples"
    count: int = number(16, above=0)
    steps: int = number(50, above=0)  # most sampler steps


@dataclass
class ReconstructedSamplesConfig(SamplesConfig):
    _target_: str = "mmlab.evaluate.callbacks.sample_sheets.ReconstructedSamples"


@dataclass
class AnswerQualityConfig(Settings):
    """A score of the model's answers at the end of a run."""

    _target_: str = "mmlab.evaluate.callbacks.quality.AnswerQuality"
    questions: str = MISSING  # folder of shards with questions
    metric: str = choice(*METRICS)
    template: str | None = None  # None: the one that the run is trained with
    types: list[str] = field(default_factory=list)  # question types; none: all
    limit: int | None = number(None, above=0)  # questions
    batch_size: int = number(64, above=0)
    max_new_tokens: int = number(64, above=0)  # of an answer


@dataclass
class SampleQualityConfig(Settings):
    """FID and KID of samples at the end of a run."""

    _target_: str = "mmlab.evaluate.callbacks.quality.SampleQuality"
    features: str = MISSING  # network whose features are compared: a run of stage=contrastive, or inception
    pictures: str = MISSING  # folder of shards to compare with
    aspect: str = "${data.aspect}"
    samples: int = number(1000, above=1)
    batch_size: int = number(64, above=0)
    root: str = "${run.root}"
