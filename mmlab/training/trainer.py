"""Lightning's Trainer from the `trainer` section; only differences from its defaults are passed."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from omegaconf import DictConfig, OmegaConf

from mmlab.config.errors import ConfigError, RunError
from mmlab.runs.finished_runs import DONE
from mmlab.runs.freed_memory import keep_freed_memory
from mmlab.runs.ranks import FSDP, rank, under_srun, world_size
from mmlab.runs.run import read_json
from mmlab.training.checkpoint import Checkpoints
from mmlab.training.checkpoint_folder import steps as checkpoint_steps
from mmlab.training.checkpoint_io import FolderCheckpointIO
from mmlab.training.config import HardwareConfig
from mmlab.training.cpu_products import products, use_products
from mmlab.training.finite import FiniteGuard
from mmlab.training.sharding import ShardedStrategy
from mmlab.training.step_loop import StepFitLoop

PROFILERS: dict[str, Any] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def precision(choice: str, accelerator: str) -> str:
    """Resolve `auto`: bf16 mixed precision where bf16 matrix units exist (GPU, AMX), else fp32."""
    if choice != "auto":
        return choice
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if torch.cpu._is_amx_tile_supported() else "32-true"


def build_trainer(
    cfg: DictConfig, folder: Path, logger: Logger | None, callbacks: list[Callback], data: Any, steps: int
) -> Trainer:
    """Build the Trainer of a run.

    Args:
        cfg: the `trainer` section.
        folder: the run's folder.
        logger: where metrics go, or None.
        callbacks: built callbacks.
        data: has `accumulation`, the micro-batches per optimizer step for a number of processes.
        steps: optimizer steps of the whole run; one Lightning epoch spans it.
    """
    quieten()
    _use_products(cfg)
    options: dict[str, Any] = {}
    accumulation = data.accumulation(world_size(cfg))
    if cfg.overfit:
        options["overfit_batches"] = accumulation
    if cfg.gradient_clip_val is not None:
        options["gradient_clip_val"] = cfg.gradient_clip_val
    if cfg.limit_val_batches is not None:
        options["limit_val_batches"] = cfg.limit_val_batches
    if cfg.deterministic:
        options["deterministic"] = True
    if cfg.profile is not None:
        # Without a file its report goes to a logger that is quiet.
        options["profiler"] = PROFILERS[cfg.profile](folder, "profile")
    plugins: list[Any] = [FolderCheckpointIO()]
    if (cluster := environment()) is not None:
        plugins.append(cluster)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator=cfg.accelerator,
        # On a CPU Lightning does not take -1, which is the same.
        devices="auto" if cfg.devices == -1 else cfg.devices,
        num_nodes=cfg.num_nodes,
        strategy=build_strategy(cfg),
        precision=precision(cfg.precision, cfg.accelerator),  # type: ignore[arg-type]
        max_steps=steps,
        accumulate_grad_batches=accumulation,
        log_every_n_steps=cfg.log_every_n_steps,
        num_sanity_val_steps=0,
        # The loader makes each rank's batches itself.
        use_distributed_sampler=False,
        enable_model_summary=False,
        logger=logger or False,
        callbacks=[FiniteGuard(), *callbacks],
        plugins=plugins,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        **options,
    )
    if "limit_val_batches" in options:
        # Overfitting would set it to the number of repeated batches.
        trainer.limit_val_batches = options["limit_val_batches"]
    StepFitLoop(trainer, cfg.val_every)
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    return trainer


def _use_products(cfg: DictConfig) -> None:
    """Choose what computes matrix products, and warn where compiled layers do not use it."""
    kind = products(cfg.products, cfg.accelerator)
    use_products(kind)
    if cfg.compile and kind == "onednn" and rank() == 0:
        print(
            "WARNING: with trainer.compile=true, layers compute their products by torch, which is slower on this CPU "
            "than trainer.products=onednn without compilation; leave out trainer.compile.",
            file=sys.stderr,
        )


def build_strategy(cfg: DictConfig) -> Any:
    """Return the strategy of the `trainer` section: ours for fsdp, otherwise the name of Lightning's."""
    if cfg.strategy != FSDP:
        return cfg.strategy
    settings: Any = OmegaConf.to_object(cfg.fsdp)
    return ShardedStrategy(settings)


def check_end(run: Path, callbacks: Sequence[Callback], end: int) -> None:
    """Check that a run may end after `end` optimizer steps: weights of fewer steps than it was trained for are gone.

    A complete run without checkpoints would start over, and replace what it has.

    Args:
        run: its folder, which may not exist yet.
        callbacks: built callbacks.
        end: optimizer steps of the whole run.

    Raises:
        ConfigError: it was trained for more.
        RunError: its record of the last end is damaged, or it is complete and has no checkpoint.
    """
    folders = [callback.folder for callback in callbacks if isinstance(callback, Checkpoints)]
    trained = [step for folder in folders for step in checkpoint_steps(folder)]
    if done := read_json(run / DONE):
        if not trained:
            raise RunError(
                f"{run} was trained for {done['steps']} steps and has no checkpoint to go on from; restore its "
                "checkpoints, or train it again beside it with run.fresh=true."
            )
        trained.append(done["steps"])
    if trained and end < max(trained):
        raise ConfigError(
            f"{run} contains a run that was trained for {max(trained)} steps and cannot end after {end}; raise "
            "trainer.max_steps or max_epochs, or give another run.name."
        )


def environment() -> ClusterEnvironment | None:
    """The launcher of the ranks, where Lightning would guess wrong; None leaves it to Lightning."""
    if TorchElasticEnvironment.detect():
        return None
    if under_srun():
        # `Checkpoints` requeues, not Lightning.
        return SLURMEnvironment(auto_requeue=False)
    # In an allocation without srun Lightning takes this process for a rank and waits for the others.
    return LightningEnvironment() if "SLURM_JOB_ID" in os.environ else None


def quieten() -> None:
    """Silence Lightning's messages about itself; its warnings about a run stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Before it kills the first rank because another one has ended, the launcher says so; once, not by each handler.
    launcher = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
    launcher.setLevel(logging.INFO)
    launcher.handlers, launcher.propagate = [logging.StreamHandler()], False
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", r".*Total length of `list` across ranks is zero.*")
    warnings.filterwarnings("ignore", r".*`srun` command is available on your system but is not used.*")
    warnings.filterwarnings("ignore", r".*does not have many workers.*")
    warnings.filterwarnings("ignore", r".*module\(s\) in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", r".*overridden `on_before_batch_transfer`.*")
    warnings.filterwarnings("ignore", r".*returned a view tensor.*")  # of a sharded part; nothing changes it in place
    warnings.filterwarnings("ignore", r".*sync_dist=True.*when logging on epoch level.*")  # means are of all ranks
    warnings.filterwarnings("ignore", r".*Checkpoint directory .* exists and is not empty.*")


def fit(trainer: Trainer, stage: Any, data: Any, fresh: bool = False) -> dict[str, float]:
    """Train from the newest intact checkpoint, or from the start if it is `fresh`; return the last metrics.

    Raises:
        RunError: the run has checkpoints, and all are damaged; a layer cannot be compiled.
        Preempted: the run was asked to exit, and has saved.
        KeyboardInterrupt: the user stopped it at once; Lightning itself would exit the process.
    """
    saving = next((c for c in trainer.callbacks if isinstance(c, Checkpoints)), None)  # type: ignore[attr-defined]
    # The strategy takes the choice of the first rank, which alone reads all that all ranks have written.
    hashes = trainer.is_global_zero or not isinstance(trainer.strategy, ShardedStrategy)
    newest = saving.newest(hashes) if saving and not fresh else None
    if newest and trainer.is_global_zero:
        print(f"resuming from {newest}")
    try:
        trainer.fit(stage, datamodule=data, ckpt_path=newest, weights_only=True)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException

        if not isinstance(error, TorchDynamoException):
            raise
        lines = [line for line in str(error).splitlines() if line and not line.endswith(" raised:")]
        reason = next(iter(lines), type(error).__name__).rstrip(".")
        raise RunError(f"A layer could not be compiled: {reason}; leave out trainer.compile to train.") from error
    # Every start ends with a validation, if there is any, but may have no step left to train.
    trained = {name: value for name, value in (saving.metrics if saving else {}).items() if name.startswith("train/")}
    metrics = {**trained, **trainer.callback_metrics}
    return {name: float(metrics[name]) for name in metrics if name.startswith(("train/loss", "val/"))}


def place(model: Any, cfg: DictConfig | HardwareConfig) -> Any:
    """Move a trained model to the device that `accelerator` names, in the dtype of `precision`."""
    cuda = cfg.accelerator != "cpu" and torch.cuda.is_available()
    dtype = torch.bfloat16 if "bf16" in precision(cfg.precision, cfg.accelerator) and cuda else torch.float32
    return model.to("cuda" if cuda else "cpu", dtype).eval()
