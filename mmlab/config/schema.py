"""Every config section as a dataclass: its fields, their types, defaults and bounds; no heavy import.

An option file of a group names its dataclass in the first line of its defaults list
(`- /schema/model/vision_language@_here_`); SCHEMAS at the bottom lists the names.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from mmlab.config import code_schema as code
from mmlab.config import curate_schema as curate
from mmlab.config import image_schema as image
from mmlab.config import verb_schema as verb
from mmlab.config.data_schema import DataConfig, ImageDataConfig
from mmlab.config.fields import choice, number, section
from mmlab.config.model_schema import (
    DualEncoderConfig,
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
    gradient_checkpointing: bool = False  # compute layers again for the backward pass, and keep their inputs alone
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


ROOTS: dict[str, type] = {
    "train": TrainConfig,
    "plan": TrainConfig,
    "eval": verb.EvalConfig,
    "score": verb.ScoreConfig,
    "score_llava_bench": verb.LLaVABenchConfig,
    "sample": verb.SampleConfig,
    "chat": verb.ChatConfig,
    "export": verb.ExportConfig,
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
