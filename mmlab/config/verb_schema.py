"""What commands that work on finished runs and recorded answers take: eval, score, sample, chat, export."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from mmlab.config.fields import choice, number, section
from mmlab.config.model_schema import HardwareConfig

METRICS = ("exact", "vqa", "gqa", "pope", "mme", "scienceqa", "captions", "facts")


@dataclass
class EvalDataConfig:
    path: str = MISSING
    blind_from: str | None = None  # training shards: their commonest answers are what one scores without looking
    train_from: str | None = None  # training pictures: a linear code made of them, or the samples' nearest neighbours


@dataclass
class EvalConfig:
    run: str = MISSING  # name or folder of a trained run
    root: str = "runs"
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    template: str | None = None  # None: the one it was trained with
    types: list[str] = field(default_factory=list)  # question types; none: all
    describe: bool | None = None  # ask for descriptions, not answers; None: if the run learned captions
    # None: exact match of answers; of descriptions their incoherence alone.
    metric: str | None = field(default=None, metadata={"choices": METRICS})
    batch_size: int = number(64, above=0)
    max_new_tokens: int | None = number(None, above=0)  # None: 64 of an answer, 1024 of ScienceQA, 300 of a description
    limit: int | None = number(None, above=0)  # questions, or pictures
    features: str | None = None  # network of FID and KID: a run of stage=contrastive, or inception
    samples: int = number(1000, above=1)  # drawn from a generative model
    sampler: Any = None  # None: the run's own
    guidance: float | None = number(None, at_least=0)  # scale; None: the sampler's own
    temperature: float | None = number(None, at_least=0)  # of codes; None: the sampler's own, as for the next two
    top_k: int | None = number(None, above=0)
    top_p: float | None = number(None, above=0, at_most=1)
    steps: int | None = number(None, above=0)  # of noise; None: the sampler's own
    candidates: int = number(1, above=0)  # drawn for each sample that a classifier accepts; 1: none is rejected
    classifier: str | None = None  # its network, as features; None: that of features, which flatters FID and KID
    seed: int = number(0, at_least=0)  # of the samples
    out: str | None = None
    trainer: HardwareConfig = field(default_factory=HardwareConfig)


@dataclass
class ScoreConfig:
    """Outputs that were recorded elsewhere, scored without a model."""

    metric: str = field(default=MISSING, metadata={"choices": METRICS})
    predictions: str = MISSING  # LLaVA's result file, {id: text}, or objects with an id and a text
    references: str = MISSING  # the right answers in the data set's own layout, such as problems.json
    splits: str | None = None  # of ScienceQA: pid_splits.json; None: the one beside the problems
    split: str = "test"  # of ScienceQA
    out: str | None = None  # folder for scores.json and scored.jsonl; None: only print


@dataclass
class LLaVABenchConfig:
    """LLaVA-Bench: a language model marks recorded answers beside a baseline's."""

    predictions: str = MISSING  # recorded answers
    questions: str = MISSING  # lines of {question_id, image, text, category}
    contexts: str = MISSING  # lines of {image, captions, instances}: the pictures in words
    baseline: str = MISSING  # the answers to compare with
    out: str = MISSING  # folder for marks, scores and the judge's replies, which are never asked for twice
    llm: Any = section("llm")  # the judge
    rules: str | None = None  # LLaVA's rule.json: what the judge is told per category; None: one text for all


@dataclass
class SampleConfig:
    run: str = MISSING  # name or folder of a trained run
    root: str = "runs"
    # `class`: a name, a number or a list of them; None: all classes in turn. Python keeps the word for itself: it can
    # name a field and a key, but no parameter and no attribute that code spells out.
    __annotations__["class"] = Any
    vars()["class"] = field(default=None, init=False, repr=False, compare=False)
    prompt: Any = None  # a text, or a list of them in turn
    map: Any = None  # file of a map, or a list of files
    count: int = number(16, above=0)
    batch_size: int = number(16, above=0)
    sampler: Any = None  # None: the run's own
    steps: int | None = number(None, above=0)  # None: the sampler's own
    guidance: float | None = number(None, at_least=0)  # scale; None: the sampler's own
    temperature: float | None = number(None, at_least=0)  # of codes; None: the sampler's own, as for the next two
    top_k: int | None = number(None, above=0)
    top_p: float | None = number(None, above=0, at_most=1)
    size: int | None = number(None, above=0)  # of pictures of codes, in pixels; None: as trained
    seed: int = number(0, at_least=0)  # of the first picture; one more for each
    strip: int = number(4, at_least=0)  # pictures that are shown on their way from noise
    out: str | None = None  # None: the first of <run>/samples/1, 2, … that is free
    # Float32: a seed's picture should not depend on the machine.
    trainer: HardwareConfig = field(default_factory=lambda: HardwareConfig(precision="32-true"))


@dataclass
class ChatConfig:
    run: str = MISSING  # name or folder of a trained run
    root: str = "runs"
    image: str | None = None
    question: str | None = None  # None: ask at the terminal
    template: str | None = None
    max_new_tokens: int = number(256, above=0)
    temperature: float = number(0.0, at_least=0)
    trainer: HardwareConfig = field(default_factory=HardwareConfig)


@dataclass
class ExportConfig:
    run: str = MISSING  # name or folder of a trained run
    root: str = "runs"
    to: str = choice("diffusers")
    out: str | None = None  # None: <run>/export/<to>
