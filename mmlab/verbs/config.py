"""Settings of the verbs: the root config of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from mmlab.config.fields import Settings, choice, number, section
from mmlab.evaluate.config import METRICS
from mmlab.runs.config import RunConfig, SweepConfig
from mmlab.runs.naming import settle_run
from mmlab.training.config import HardwareConfig, TrainerConfig


@dataclass
class TrainConfig(Settings):
    run: RunConfig = field(default_factory=RunConfig)
    model: Any = section("model")
    data: Any = section("data")
    stage: Any = section("stage")
    optim: Any = section("optim")
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: Any = section("logger")
    callbacks: dict[str, Any] = field(default_factory=dict)  # name → {_target_: …}
    sweep: SweepConfig = field(default_factory=SweepConfig)
    process: Any = section("process", default=None)  # noise process of a diffusion stage
    sampler: Any = section("sampler", default=None)  # of the samples that a generative stage shows; not trained with
    seed: int = number(0, at_least=0)

    @staticmethod
    def settle(node: Any, choices: Mapping[str, str | None], overrides: Sequence[str]) -> None:
        """Name the run, and the runs that it starts from."""
        settle_run(node, choices, overrides)


@dataclass
class EvalDataConfig(Settings):
    path: str = MISSING
    blind_from: str | None = None  # training shards: their commonest answers are what one scores without looking
    train_from: str | None = None  # training pictures: a linear code made of them, or the samples' nearest neighbours


@dataclass
class DrawConfig(Settings):
    """How a generative model draws; settings of the other kind of model are refused."""

    sampler: Any = section("sampler", default=None)  # None: the run's own
    guidance: float | None = number(None, at_least=0)  # scale; None: the sampler's own, as for all below
    steps: int | None = number(None, above=0)  # of a diffusion sampler
    temperature: float | None = number(None, at_least=0)  # of a code prior, as are the next two
    top_k: int | None = number(None, above=0)
    top_p: float | None = number(None, above=0, at_most=1)


@dataclass
class EvalConfig(DrawConfig):
    run: str = MISSING  # name or folder of a trained run
    root: str = "runs"
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    template: str | None = None  # None: the one it was trained with
    types: list[str] = field(default_factory=list)  # question types; none: all
    describe: bool | None = None  # ask for descriptions, not answers; None: if the run learned captions
    # None: exact match of answers; of descriptions their incoherence alone.
    metric: str | None = choice(*METRICS, default=None)
    batch_size: int = number(64, above=0)
    max_new_tokens: int | None = number(None, above=0)  # None: 64 of an answer, 1024 of ScienceQA, 300 of a description
    limit: int | None = number(None, above=0)  # questions, or pictures
    features: str | None = None  # network of FID and KID: a run of stage=contrastive, or inception
    samples: int = number(1000, above=1)  # drawn from a generative model
    candidates: int = number(1, above=0)  # drawn for each sample that a classifier accepts; 1: none is rejected
    classifier: str | None = None  # its network, as features; None: that of features, which flatters FID and KID
    seed: int = number(0, at_least=0)  # of the samples
    out: str | None = None
    trainer: HardwareConfig = field(default_factory=HardwareConfig)


@dataclass
class ScoreConfig(Settings):
    """Outputs that were recorded elsewhere, scored without a model."""

    metric: str = choice(*METRICS, default=MISSING)
    predictions: str = MISSING  # LLaVA's result file, {id: text}, or objects with an id and a text
    references: str = MISSING  # the right answers in the data set's own layout, such as problems.json
    splits: str | None = None  # of ScienceQA: pid_splits.json; None: the one beside the problems
    split: str = "test"  # of ScienceQA
    out: str | None = None  # folder for scores.json and scored.jsonl; None: only print


@dataclass
class LLaVABenchConfig(Settings):
    """LLaVA-Bench: a language model marks recorded answers beside a baseline's."""

    predictions: str = MISSING  # recorded answers
    questions: str = MISSING  # lines of {question_id, image, text, category}
    contexts: str = MISSING  # lines of {image, captions, instances}: the pictures in words
    baseline: str = MISSING  # the answers to compare with
    out: str = MISSING  # folder for marks, scores and the judge's replies, which are never asked for twice
    llm: Any = section("llm")  # the judge
    rules: str | None = None  # LLaVA's rule.json: what the judge is told per category; None: one text for all


@dataclass
class SampleConfig(DrawConfig):
    run: str = MISSING  # name or folder of a trained run
    root: str = "runs"
    label: Any = None  # class: a name, a number or a list of them; None: all classes in turn
    prompt: Any = None  # a text, or a list of them in turn
    map: Any = None  # file of a map, or a list of files
    count: int = number(16, above=0)
    batch_size: int = number(16, above=0)
    size: int | None = number(None, above=0)  # of pictures of codes, in pixels; None: as trained
    seed: int = number(0, at_least=0)  # of the first picture; one more for each
    strip: int = number(4, at_least=0)  # pictures that are shown on their way from noise
    out: str | None = None  # None: the first of <run>/samples/1, 2, … that is free
    # Float32: a seed's picture should not depend on the machine.
    trainer: HardwareConfig = field(default_factory=lambda: HardwareConfig(precision="32-true"))


@dataclass
class ChatConfig(Settings):
    run: str = MISSING  # name or folder of a trained run
    root: str = "runs"
    image: str | None = None
    question: str | None = None  # None: ask at the terminal
    template: str | None = None
    max_new_tokens: int = number(256, above=0)
    temperature: float = number(0.0, at_least=0)
    trainer: HardwareConfig = field(default_factory=HardwareConfig)


@dataclass
class ExportConfig(Settings):
    run: str = MISSING  # name or folder of a trained run
    root: str = "runs"
    to: str = choice("diffusers")
    out: str | None = None  # None: <run>/export/<to>
