"""Every config section as a dataclass: its fields, their types, defaults and bounds; no heavy import.

An option file of a group names its dataclass in the first line of its defaults list
(`- /schema/model/vision_language@_here_`); SCHEMAS at the bottom lists the names.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from mmlab.config import code_schema as code
from mmlab.config import curate_schema as curate
from mmlab.config import image_schema as image
from mmlab.config.data_schema import DataConfig, ImageDataConfig
from mmlab.config.fields import choice, number, section
from mmlab.config.model_schema import (
    DualEncoderConfig,
    HardwareConfig,
    ImageTextQFormerConfig,
    LanguageConfig,
    LanguageOnlyConfig,
    LinearConnectorConfig,
    MLPConnectorConfig,
    QFormerConfig,
    QFormerVisionLanguageConfig,
    VisionConfig,
    VisionLanguageConfig,
)
from mmlab.config.stage_schema import (
    AlignConfig,
    ContrastiveConfig,
    FinetuneConfig,
    LanguagePretrainingConfig,
    QFormerAlignmentConfig,
    QFormerPretrainingConfig,
)

METRICS = ("exact", "vqa", "gqa", "pope", "mme", "scienceqa", "captions", "facts")


@dataclass
class RunConfig:
    """The identity of a run and where it lies."""

    # None: the recipe (or <model>-<stage>) and 8 hex digits of what was overridden; set when composed.
    name: str | None = None
    root: str = "runs"
    dir: str = "${run.root}/${run.name}"
    fresh: bool = False  # start over; the run of that name is kept beside it
    sweep: str | None = None  # the sweep that the run is a point of


@dataclass
class AdamWConfig:
    _target_: str = "mmlab.training.optim.AdamW"
    lr: float = number(1e-3, above=0)
    weight_decay: float = number(0.0, at_least=0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = number(1e-8, above=0)
    schedule: str = choice("cosine", "constant", "linear")
    warmup_ratio: float = number(0.03, at_least=0, at_most=1)
    min_lr: float = number(0.0, at_least=0)
    part_lr: dict[str, float] = field(default_factory=dict)  # learning rates of single parts


@dataclass
class TrainerConfig:
    accelerator: str = choice("auto", "cpu", "gpu", "cuda", "mps")
    devices: Any = 1  # how many, or auto
    num_nodes: int = number(1, above=0)
    strategy: str = "auto"
    precision: str = choice("auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")
    max_steps: int | None = number(None, above=0)  # optimizer steps
    max_epochs: float | None = number(None, above=0)
    gradient_clip_val: float | None = number(None, above=0)
    val_every: int | None = number(None, above=0)  # optimizer steps; None: at the end only
    limit_val_batches: int | None = number(None, at_least=0)  # None: all, 0: no validation
    log_every_n_steps: int = number(10, above=0)
    deterministic: bool = False
    overfit: bool = False  # repeat the first global batch
    profile: str | None = field(default=None, metadata={"choices": ("simple", "advanced", "pytorch")})


@dataclass
class CSVLoggerConfig:
    """One `metrics.csv` in the run's folder."""

    _target_: str = "mmlab.training.csv_log.CSVLog"
    save_dir: str = "${run.dir}"


@dataclass
class WandbLoggerConfig:
    """wandb, with `metrics.csv` beside it. The key stays in the environment: it has no place in a config."""

    _target_: str = "mmlab.training.wandb_log.WandbLog"
    save_dir: str = "${run.dir}"
    project: str = "mmlab"
    entity: str | None = None
    name: str | None = "${run.name}"
    id: str | None = None  # None: the run's name and a few characters, fixed at its first start
    group: str | None = "${run.sweep}"
    job_type: str | None = None  # None: the option of the stage; set when composed
    tags: list[str] | None = None  # None: the options of experiment, model and data; set when composed
    offline: bool | None = None  # None: offline unless WANDB_API_KEY is in the environment; set when composed


@dataclass
class NoLoggerConfig:
    _target_: str | None = None


@dataclass
class SweepConfig:
    """What the points of a sweep (`-m`) are compared by."""

    metric: str = "train/loss"  # a name in the runs' done.json: train/loss, val/loss, …
    direction: str = choice("minimize", "maximize")


@dataclass
class TrainConfig:
    run: RunConfig = field(default_factory=RunConfig)
    model: Any = section("model")
    data: Any = section("data")
    stage: Any = section("stage")
    optim: Any = section("optim")
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: Any = section("logger")
    callbacks: dict[str, Any] = field(default_factory=dict)  # name → {_target_: …}
    sweep: SweepConfig = field(default_factory=SweepConfig)
    process: Any = None  # how a picture becomes noise; of diffusion stages
    sampler: Any = None  # of the samples that a generative stage shows; changes nothing that is trained
    seed: int = number(0, at_least=0)


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


ROOTS: dict[str, type] = {
    "train": TrainConfig,
    "plan": TrainConfig,
    "eval": EvalConfig,
    "score": ScoreConfig,
    "score_llava_bench": LLaVABenchConfig,
    "sample": SampleConfig,
    "chat": ChatConfig,
    "export": image.ExportConfig,
    "curate_minigpt4": curate.MiniGPT4Config,
    "curate_llava_instruct": curate.LLaVAInstructConfig,
    "curate_review": curate.ReviewConfig,
}

# The names that option files write as /schema/<name>@_here_.
SCHEMAS: dict[str, type] = {
    **ROOTS,
    "model/vision_language": VisionLanguageConfig,
    "model/qformer_vision_language": QFormerVisionLanguageConfig,
    "model/image_text_qformer": ImageTextQFormerConfig,
    "model/dual_encoder": DualEncoderConfig,
    "model/language_only": LanguageOnlyConfig,
    "vision": VisionConfig,
    "language": LanguageConfig,
    "qformer": QFormerConfig,
    "connector/mlp": MLPConnectorConfig,
    "connector/linear": LinearConnectorConfig,
    "stage/align": AlignConfig,
    "stage/finetune": FinetuneConfig,
    "stage/qformer_align": QFormerAlignmentConfig,
    "stage/qformer_pretraining": QFormerPretrainingConfig,
    "stage/contrastive": ContrastiveConfig,
    "stage/language_pretraining": LanguagePretrainingConfig,
    "data": DataConfig,
    "data/images": ImageDataConfig,
    "model/autoencoder": image.AutoencoderModelConfig,
    "model/diffusion": image.DiffusionModelConfig,
    "model/code_prior": code.CodePriorModelConfig,
    "first_stage/identity": image.IdentityConfig,
    "first_stage/kl": image.KLAutoencoderConfig,
    "first_stage/vq": image.VQAutoencoderConfig,
    "first_stage/gumbel": image.GumbelAutoencoderConfig,
    "quantizer/nearest": image.QuantizerConfig,
    "quantizer/gumbel": image.GumbelQuantizerConfig,
    "discriminator/patch": image.PatchDiscriminatorConfig,
    "perceptual/lpips": image.LPIPSConfig,
    "perceptual/stand_in": image.StandInConfig,
    "conditioner/none": image.NoConditionConfig,
    "conditioner/class": image.ClassConditionConfig,
    "conditioner/text": image.TextConditionConfig,
    "conditioner/map": code.MapConditionConfig,
    "prior/gpt": code.CodeGPTConfig,
    "denoiser/unet": image.UNetConfig,
    "denoiser/dit": image.DiTConfig,
    "stage/autoencoder": image.AutoencoderTrainingConfig,
    "stage/latent_diffusion": image.LatentDiffusionConfig,
    "stage/code_prior": code.CodePriorConfig,
    "process/diffusion": image.DiffusionProcessConfig,
    "process/flow": image.FlowMatchingConfig,
    "sampler": image.SamplerConfig,
    "code_sampler": code.CodeSamplerConfig,
    "clip": image.ClipConfig,
    "optim/adamw": AdamWConfig,
    "trainer": TrainerConfig,
    "logger/csv": CSVLoggerConfig,
    "logger/wandb": WandbLoggerConfig,
    "logger/none": NoLoggerConfig,
    "llm/endpoint": curate.EndpointConfig,
    "llm/local": curate.LocalModelConfig,
}


def register() -> None:
    """Put the schemas into Hydra's ConfigStore (again and again without harm)."""
    store = ConfigStore.instance()
    for path, node in SCHEMAS.items():
        group, _, name = f"schema/{path}".rpartition("/")
        store.store(name=name, group=group, node=node)
