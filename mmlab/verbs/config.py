"""Settings of the verbs: the root config of each."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, OmegaConf

from mmlab.config.fields import Settings, check_fields, choice, number, section
from mmlab.data.config import ASPECTS, ShardsConfig
from mmlab.evaluate.config import METRICS, AnswerQualityConfig
from mmlab.model.config import ANSWER_TOKENS
from mmlab.runs.config import RunConfig, SweepConfig
from mmlab.runs.naming import name_run
from mmlab.training.config import HardwareConfig, TrainerConfig
from mmlab.verbs._repetition import take_settings


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
    sampler: Any = section("sampler", default=None)  # for the samples shown during training of a generative stage
    seed: int = number(0, at_least=0)

    @staticmethod
    def apply_command_line(node: Any, choices: Mapping[str, str | None], overrides: Sequence[str]) -> None:
        """Set the names of the run and of the runs that it starts from."""
        name_run(node, choices, overrides)


@dataclass
class PlanConfig(Settings):
    """What the time of a planned run is computed from."""

    gpu: str = "A100"  # its peak rate and memory are in mmlab/training/gpus.py
    mfu: float = number(0.4, above=0, at_most=1)  # share of the peak rate (PaLM, table 3: 21 % to 46 %)


@dataclass
class PlannedRunConfig(TrainConfig):
    plan: PlanConfig = field(default_factory=PlanConfig)


@dataclass
class EvalDataConfig(Settings):
    path: str = MISSING  # folder of shards
    # Training shards: of their answers, for the baselines question_only and constant; of their images, for the linear
    # code of the same size, nearest neighbors and the classifier of rejection sampling.
    train_from: str | None = None
    # Share of a set's samples that may be unusable; those are left out of the scores.
    bad_budget: float = number(ShardsConfig.bad_budget, at_least=0, at_most=1)


@dataclass
class DrawConfig(Settings):
    """Sampling from a generative model; settings for another kind of model are refused."""

    # None: the run's. Of another one, only its option's own settings and those of the command line replace the run's.
    sampler: Any = section("sampler", default=None)
    guidance: float | None = number(None, at_least=0)  # scale; None: the sampler's, as in all fields below
    steps: int | None = number(None, above=0)  # of a diffusion sampler
    temperature: float | None = number(None, at_least=0)  # of a code prior, as the next two
    top_k: int | None = number(None, above=0)
    top_p: float | None = number(None, above=0, at_most=1)
    # Width of the averages of weights to draw with, of a run with callbacks.posthoc_ema; None: the run's artifacts.
    ema: float | None = number(None, above=0)

    @staticmethod
    def apply_command_line(node: Any, choices: Mapping[str, str | None], overrides: Sequence[str]) -> None:
        """Keep of the sampler what was chosen: its option's settings that are not defaults, and the command line's."""
        schema = OmegaConf.get_type(node.sampler)
        if node.sampler is None or schema is dict:
            return
        check_fields(node)  # while its keys are known
        keys = {override.lstrip("+~").split("=")[0].split("@")[0].replace("/", ".") for override in overrides}
        node.sampler = _chosen(node.sampler, OmegaConf.structured(schema), "sampler", keys)


def _chosen(node: Any, defaults: Any, where: str, keys: Set[str]) -> dict[str, Any]:
    """Return the values that are not defaults, or that `keys` of the command line name."""
    chosen: dict[str, Any] = {}
    for key in node:
        value, default, name = node[key], defaults[key], f"{where}.{key}"
        if key == "guidance" and name not in keys and OmegaConf.is_dict(value):
            if inner := _chosen(value, default, name, keys):
                chosen[key] = inner
        elif key in ("_target_", "name") or value != default or any(f"{k}.".startswith(f"{name}.") for k in keys):
            chosen[key] = value
    return chosen


@dataclass
class EvalConfig(DrawConfig):
    # scores.json of an earlier evaluation of images, which is repeated: all settings that the command line leaves open
    # are taken from it.
    scores: str | None = None
    run: str = MISSING  # name or folder of a trained run
    root: str = "runs"  # folder of all runs
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    template: str | None = None  # chat template; None: the one of training
    types: list[str] = field(default_factory=list)  # question types; empty: all
    # What precedes a dialogue's later questions: the right answers to the earlier ones, or the model's own.
    history: str = choice("right", "own")
    blind: int | None = number(AnswerQualityConfig.blind, at_least=0)  # as callbacks.answer_quality.blind
    describe: bool | None = None  # ask for descriptions instead of answers; None: true if trained only on captions
    # None: exact match for answers; for descriptions only their incoherence.
    metric: str | None = choice(*METRICS, default=None)
    batch_size: int = number(64, above=0)
    max_new_tokens: int | None = number(None, above=0)  # None: 64 for answers, 1024 for ScienceQA, 300 for descriptions
    limit: int | None = number(None, above=0)  # maximal number of questions or images
    # Of a model that compares images and texts: names of the classes, in the order of their numbers; empty: those of
    # the data. And texts with {} for the class; empty: the run's class_prompt, or 'a photo of a {}.'.
    classes: list[str] = field(default_factory=list)
    class_prompts: list[str] = field(default_factory=list)
    # Network for FID and KID: a run of stage=contrastive, inception, or another model's folder or name on the hub; or
    # a list of them. The first is used wherever there is one.
    features: Any = None
    samples: int = number(1000, above=1)  # number of samples from a generative model
    candidates: int = number(1, above=0)  # samples per accepted sample in classifier rejection; 1: no rejection
    classifier: str | None = None  # network of the classifier; None: as features, which biases FID and KID
    seed: int = number(0, at_least=0)  # of the samples
    out: str | None = None  # None: <run>/eval/<name of the data's folder>, or `repeated` beside the file of scores
    trainer: HardwareConfig = field(default_factory=HardwareConfig)

    @staticmethod
    def apply_command_line(node: Any, choices: Mapping[str, str | None], overrides: Sequence[str]) -> None:
        """Keep of the sampler what was chosen, and take the settings of scores that are to be repeated."""
        DrawConfig.apply_command_line(node, choices, overrides)
        if node.scores is not None:
            take_settings(node, overrides)


@dataclass
class ScoreConfig(Settings):
    """Scores of recorded outputs, without a model."""

    metric: str = choice(*METRICS, default=MISSING)
    predictions: str = MISSING  # LLaVA's result file, {id: text}, or objects with an id and a text
    references: str = MISSING  # the correct answers in the data set's own layout, such as problems.json
    splits: str | None = None  # ScienceQA's pid_splits.json; None: the one beside the problems
    split: str = "test"  # of ScienceQA
    # Share of the predictions, and of the references, that may be unusable.
    bad_budget: float = number(ShardsConfig.bad_budget, at_least=0, at_most=1)
    out: str | None = None  # folder for scores.json and scored.jsonl; None: only print


@dataclass
class FIDConfig(Settings):
    """Distances between two sets of images, without a model that draws them."""

    pictures: str = MISSING  # folder of image files or shards, such as a model's samples
    references: str = MISSING  # the same of real images
    features: Any = MISSING  # network whose features are compared, or several, as for mmlab eval
    root: str = "runs"  # folder of all runs
    size: int | None = number(None, above=0)  # side in pixels at which images are compared; None: of the first picture
    aspect: str = choice(*ASPECTS, default="crop")  # how images become square
    limit: int | None = number(None, above=0)  # maximal number of images of each set, evenly spread
    batch_size: int = number(64, above=0)
    bad_budget: float = number(ShardsConfig.bad_budget, at_least=0, at_most=1)  # share of images that may be unusable
    out: str | None = None  # folder for scores.json and pictures.png; None: only print
    trainer: HardwareConfig = field(default_factory=HardwareConfig)


@dataclass
class LLaVABenchConfig(Settings):
    """LLaVA-Bench: a language model grades recorded answers and those of a baseline."""

    predictions: str = MISSING  # recorded answers
    questions: str = MISSING  # lines of {question_id, image, text, category}
    contexts: str = MISSING  # lines of {image, captions, instances}: the images in words
    baseline: str = MISSING  # answers of the baseline
    out: str = MISSING  # folder for grades, scores and the judge's replies, which are reused
    llm: Any = section("llm")  # the judge
    rules: str | None = None  # LLaVA's rule.json: instructions per category; None: one instruction for all


@dataclass
class SampleConfig(DrawConfig):
    run: str = MISSING  # name or folder of a trained run
    root: str = "runs"  # folder of all runs
    label: Any = None  # class name or number, or a list of them; None: all classes in turn
    prompt: Any = None  # text, or a list of texts
    map: Any = None  # file of a map, or a list of files
    # For diffusion models: an image to start from, and what is drawn of it (white; black is kept). Files, or lists.
    image: Any = None
    mask: Any = None
    # Share of the steps that are taken from the image: near 0 it hardly changes. None: 0.8, or 1 with a mask.
    strength: float | None = number(None, above=0, at_most=1)
    count: int = number(16, above=0)  # number of images; labels, prompts and maps are used in turn
    batch_size: int = number(16, above=0)
    # Pixels: the side for code priors, [height, width] of a bucket for denoisers that were trained with data.buckets.
    # None: squares, as trained.
    size: Any = None
    seed: int = number(0, at_least=0)  # of the first image; the following ones count up
    strip: int = number(4, at_least=0)  # number of images whose denoising steps are shown
    out: str | None = None  # None: the first unused of <run>/samples/1, 2, …
    # Float32, so that the image of a seed does not depend on the machine.
    trainer: HardwareConfig = field(default_factory=lambda: HardwareConfig(precision="32-true"))


@dataclass
class ChatConfig(Settings):
    run: str = MISSING  # name or folder of a trained run
    root: str = "runs"  # folder of all runs
    image: Any = None  # file, or several as a list
    question: str | None = None  # None: ask at the terminal
    template: str | None = None  # chat template; None: the one of training
    max_new_tokens: int = number(ANSWER_TOKENS, above=0)
    temperature: float = number(0.0, at_least=0)
    trainer: HardwareConfig = field(default_factory=HardwareConfig)


@dataclass
class DemoConfig(Settings):
    """A page to try a trained run on."""

    run: str = MISSING  # name or folder of a trained run that answers or draws
    compare: str | None = None  # another one of the same kind, beside it
    root: str = "runs"  # folder of all runs
    host: str = "127.0.0.1"  # address to serve at; 0.0.0.0: this machine's addresses, for anybody who can reach it
    port: int = number(7860, at_least=0, at_most=65535)  # 0: any free one
    template: str | None = None  # chat template of runs that answer; None: the one of training
    max_new_tokens: int = number(ANSWER_TOKENS, above=0)  # of an answer, until the page changes it
    # With precision=auto, images are drawn in float32, as by mmlab sample.
    trainer: HardwareConfig = field(default_factory=HardwareConfig)


@dataclass
class ExportConfig(DrawConfig):
    run: str = MISSING  # name or folder of a trained run
    root: str = "runs"  # folder of all runs
    # transformers: runs that write text; diffusers: runs of images. None: the one that the run can be exported to.
    to: str | None = choice("diffusers", "transformers", default=None)
    out: str | None = None  # None: <run>/export/<to>
    merge: bool = True  # merge the run's adapters into the weights; false: write them beside the weights
