"""Settings of the optimizer, the trainer and the loggers (conf/optim, conf/trainer, conf/logger)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmlab.config.fields import Settings, choice, number

STORED_DTYPES = ("float16", "float32")
"""Of numbers that are kept on disk beside a run's weights."""


@dataclass
class AdamWConfig(Settings):
    _target_: str = "mmlab.training.optim.AdamW"
    lr: float = number(1e-3, above=0)  # peak
    weight_decay: float = number(0.0, at_least=0)  # of matrices; biases, norms and 1D embeddings have none
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = number(1e-8, above=0)
    schedule: str = choice("cosine", "constant", "linear")  # after the warm-up; cosine and linear end at min_lr
    warmup_ratio: float = number(0.03, at_least=0, at_most=1)  # share of all optimizer steps (LLaVA: 0.03)
    min_lr: float = number(0.0, at_least=0)  # at the end of the schedule
    part_lr: dict[str, float] = field(default_factory=dict)  # peak rates of individual parts, such as {connector: 2e-5}


@dataclass
class LoRAConfig(Settings):
    """A low-rank adapter (arXiv 2106.09685), the only thing of its part that is trained; defaults of LLaVA-1.5."""

    rank: int = number(128, above=0)
    alpha: int = number(256, above=0)  # the product of its matrices is multiplied by alpha / rank
    dropout: float = number(0.05, at_least=0, below=1)  # of its input
    # Last words of the names of its layers, such as [q_proj, v_proj]; all-linear: every linear layer but the output's.
    targets: Any = "all-linear"


@dataclass
class HardwareConfig(Settings):
    """Where a trained model runs."""

    accelerator: str = choice("auto", "cpu", "gpu", "cuda", "mps")
    precision: str = choice("auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")


@dataclass
class FSDPConfig(Settings):
    """How `trainer.strategy=fsdp` shards weights, gradients and optimizer state over the devices."""

    whole_below: int = number(500_000_000, at_least=0)  # weights of a frozen part that is not sharded but kept whole
    # Reduce gradients once per optimizer step, not per micro-batch; each device then has all of them, in fp32.
    hold_reduction: bool = False


@dataclass
class TrainerConfig(HardwareConfig):
    devices: Any = 1  # how many, or auto
    num_nodes: int = number(1, above=0)
    strategy: str = "auto"  # ddp (or a variant of Lightning's), or fsdp
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)  # for strategy=fsdp
    max_steps: int | None = number(None, above=0)  # optimizer steps
    max_epochs: float | None = number(None, above=0)
    # Of fp32 matrix products on a CPU. auto: onednn on those of AMD with AVX-512, where it takes half of torch's time.
    products: str = choice("auto", "torch", "onednn")
    gradient_checkpointing: bool = False  # compute layers again for the backward pass, and keep only their inputs
    compile: bool = False  # run layers in training steps as compiled by torch.compile
    gradient_clip_val: float | None = number(None, above=0)  # norm over all parameters; None: no clipping
    val_every: int | None = number(None, above=0)  # optimizer steps; the end is validated too, and alone with None
    limit_val_batches: int | None = number(None, at_least=0)  # None: all, 0: no validation
    log_every_n_steps: int = number(10, above=0)  # optimizer steps
    deterministic: bool = False  # use only deterministic algorithms, at the cost of speed
    overfit: bool = False  # repeat the first global batch
    profile: str | None = choice("simple", "advanced", "pytorch", default=None)  # one of Lightning's profilers


@dataclass
class CSVLogConfig(Settings):
    """One `metrics.csv` in the run's folder."""

    _target_: str = "mmlab.training.csv_log.CSVLog"
    save_dir: str = "${run.dir}"


@dataclass
class TensorBoardLogConfig(Settings):
    """Event files in `tensorboard/` in the run's folder, with `metrics.csv` beside them."""

    _target_: str = "mmlab.training.tensorboard_log.TensorBoardLog"
    save_dir: str = "${run.dir}"


@dataclass
class MLflowLogConfig(Settings):
    """MLflow, with `metrics.csv` beside it. User and password of a server stay in the environment."""

    _target_: str = "mmlab.training.mlflow_log.MLflowLog"
    save_dir: str = "${run.dir}"
    experiment: str = "mmlab"
    name: str = "${run.name}"
    # None: MLFLOW_TRACKING_URI, or mlruns/mlflow.db in the folder of all runs.
    tracking_uri: str | None = None


@dataclass
class WandbLogConfig(Settings):
    """wandb, with `metrics.csv` beside it. The key stays in the environment: it has no place in a config."""

    _target_: str = "mmlab.training.wandb_log.WandbLog"
    save_dir: str = "${run.dir}"
    project: str = "mmlab"
    entity: str | None = None  # team or user
    name: str | None = "${run.name}"
    id: str | None = None  # None: the run's name and a few random characters, fixed at its first start
    group: str | None = "${run.sweep}"  # the sweep that the run is a point of
    job_type: str | None = None  # None: the option of the stage; set when composed
    tags: list[str] | None = None  # None: the options of experiment, model and data; set when composed
    offline: bool | None = None  # None: offline unless WANDB_API_KEY is in the environment; set when composed

    @staticmethod
    def apply_command_line(node: Any, choices: Mapping[str, str | None], overrides: Sequence[str]) -> None:
        """Fill in whether there is a key, the stage, and the options for the tags."""
        if node.offline is None:
            node.offline = "WANDB_API_KEY" not in os.environ or os.environ.get("WANDB_MODE") == "offline"
        if node.job_type is None:
            node.job_type = choices.get("stage")
        if node.tags is None:
            options = [choices.get(group) for group in ("experiment", "model", "data")]
            node.tags = [option for option in options if option not in (None, "???")]


@dataclass
class NoLoggerConfig(Settings):
    _target_: str | None = None


@dataclass
class CheckpointsConfig(Settings):
    _target_: str = "mmlab.training.checkpoint.Checkpoints"
    folder: str = "${run.dir}/checkpoints"
    every_n_steps: int = number(200, above=0)  # optimizer steps between saves
    keep: int = number(2, at_least=2)  # newest checkpoints that stay; the one before a damaged one is resumed from
    grace_s: float = number(30.0, above=0)  # seconds between signal and kill (SLURM's KillWait: 30); a warning's limit


@dataclass
class EMAConfig(Settings):
    _target_: str = "mmlab.training.ema.EMA"
    decay: float = number(0.9999, at_least=0, below=1)  # share of the old average at each step (DDPM, LDM, DiT: 0.9999)
    parts: list[str] | None = None  # names of the parts to average; None: all that learn


@dataclass
class PostHocEMAConfig(Settings):
    """Snapshots of averages with power-function profiles, of which any width is made later (EDM2, arXiv 2312.02696)."""

    _target_: str = "mmlab.training.posthoc_ema.PostHocEMA"
    widths: list[float] = field(default_factory=lambda: [0.05, 0.1])  # of the averages, as shares of the training
    snapshots: int = number(20, above=0)  # of each average, evenly over the run and at its end
    dtype: str = choice(*STORED_DTYPES)  # of the snapshots; the averages themselves are float32


@dataclass
class ProgressConfig(Settings):
    _target_: str = "mmlab.training.progress.Progress"
    lines: int = number(20, above=0)  # lines printed over a run when the output is not a terminal
    # Peak rate of a device, for perf/mfu; None: of bf16, if the precision is 16 bits and the GPU is in the table.
    peak_tflops: float | None = number(None, above=0)


@dataclass
class BatchLogConfig(Settings):
    """The samples of each step, for proofs that none is lost or repeated."""

    _target_: str = "mmlab.training.resume_proof.BatchLog"
    folder: str = "${run.dir}"
    kill_at: int | None = number(None, above=0)  # optimizer step that begins with SIGKILL
    kill_in_validation: int | None = number(None, above=0)  # optimizer step whose validation begins with SIGKILL
