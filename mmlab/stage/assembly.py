"""From a config, or a finished run, to a stage, its data and its model."""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mmlab.config.build import build, locate
from mmlab.config.errors import ConfigError
from mmlab.config.schemas import schema_of
from mmlab.data.config import Prompt
from mmlab.data.conversation import asking
from mmlab.data.module import ShardDataModule
from mmlab.model.activation_checkpointing import checkpoint_activations
from mmlab.model.compiled_layers import CompiledLayers
from mmlab.runs.ranks import FSDP, rank
from mmlab.runs.references import locate_files, starting_runs
from mmlab.runs.run import find_run, load_run_config
from mmlab.stage.stage import Stage
from mmlab.training.artifacts import describe_base
from mmlab.training.filling import fill_parts, random_parts
from mmlab.training.lora import add_adapters
from mmlab.training.run_identity import check_tokenizers
from mmlab.training.trainable import parts_of
from mmlab.training.trainer import precision
from mmlab.weights import read_as_stored


def build_stage(cfg: DictConfig) -> Any:
    """Build the model, the optimizer and the stage around them, then fill the model's parts.

    The stage's `sources` is the artifact that each part was filled from. Its `kept` names the parts with frozen weights
    that are random: nothing could restore them, so they are saved with what is trained.

    Raises:
        ConfigError: parts that cannot be built or filled, or that do not fit.
    """
    runs = [find_run(run, cfg.run.root) for run in cfg.stage.init_from]
    model = build(cfg.model)
    stage = build_around(model, cfg)
    if isinstance(stage, Stage):
        read_in_bf16(model, stage.rounded(precision(cfg.trainer.precision, cfg.trainer.accelerator)))
    elif cfg.trainer.strategy == FSDP:
        raise ConfigError(
            f"trainer.strategy={FSDP} shards the model of an mmlab.stage.stage.Stage, which {type(stage).__name__} is "
            "not; use trainer=ddp, or derive it from Stage."
        )
    if cfg.trainer.strategy == FSDP:
        read_as_stored(model)  # each rank casts its share
    stage.sources = artifacts = fill_parts(model, runs)
    stage.kept = random_parts(model, artifacts)
    if adapted := list(cfg.stage.get("lora") or {}):
        put_on_adapters(stage, adapted)
    if isinstance(stage, Stage):
        stage.on_filled(artifacts)
    for name in stage.kept if rank() == 0 else ():
        print(
            f"WARNING: '{name}' is frozen with the random weights that it was built with: no run in stage.init_from "
            f"has it, and model.{name} names no pretrained weights. They are saved with the run.",
            file=sys.stderr,
        )
    return stage


def build_around(model: nn.Module, cfg: DictConfig) -> Any:
    """Build the optimizer and the stage around a model, empty or filled.

    Its layers are compiled and checkpointed as the trainer's settings say: what is computed again is compiled, too.
    """
    parts = {name: build(cfg[name]) for name in ("process", "sampler") if cfg.get(name) is not None}
    compiled = CompiledLayers(model) if cfg.trainer.compile else None
    if cfg.trainer.gradient_checkpointing:
        checkpoint_activations(model)
    stage = build(cfg.stage, model=model, optim=build(cfg.optim), **parts)
    if isinstance(stage, Stage):
        stage.compiled = compiled
    elif compiled is not None:
        raise ConfigError(
            "trainer.compile=true compiles the layers of an mmlab.stage.stage.Stage, which "
            f"{type(stage).__name__} is not; leave it out, or derive it from Stage."
        )
    return stage


def read_in_bf16(model: nn.Module, names: Sequence[str]) -> None:
    """Give the empty weights of some parts the dtype in which they will be read.

    Parts that have weights are cast when training starts. Buffers take no memory, and stay as they are: rotary
    frequencies in bf16 would be off by up to a radian at position 1,000.
    """
    for weight in (weight for name in names for weight in parts_of(model)[name].parameters()):
        if weight.is_meta and weight.is_floating_point():
            weight.data = weight.data.to(torch.bfloat16)


def put_on_adapters(stage: Any, names: Sequence[str]) -> None:
    """Put a fresh adapter on each named part of a filled stage; raises ConfigError for parts that cannot have one."""
    for name in names:
        if name in stage.kept:
            raise ConfigError(
                f"stage.lora.{name}: the part has random weights, which an adapter cannot make up for; name a run that "
                f"has it in stage.init_from, or set model.{name}.source, or train it whole."
            )
    stage.bases = describe_base(stage.model, names, stage.sources)
    add_adapters(stage.model, stage.config.lora)


def build_data(cfg: DictConfig, stage: Any) -> ShardDataModule:
    """Build the data module with the stage's collate.

    Raises:
        ConfigError, DataError: sources that cannot be opened, or settings that the stage's batches do not have.
    """
    data: Any = OmegaConf.to_object(cfg.data)
    return build(data, collate=stage.collate(data))


def restore(folder: Path, quantized: bool = True, merge: bool = True) -> tuple[Any, DictConfig]:
    """Return (the trained model in eval mode, the run's config), without the parts that only training uses.

    Its parts are filled from the runs that this one started from, then from its own artifacts. What the config refers
    to is found from any working folder, see `mmlab.runs.references`.

    Args:
        folder: of the run.
        quantized, merge: see `fill_parts`.

    Raises:
        ConfigError: the run has not finished, or a run that it started from is gone.
        RunError: its tokenizer was replaced.
    """
    cfg = load_run_config(folder)
    left_out = getattr(schema_of(cfg.model._target_), "training_only", ())
    cfg.model.update(dict.fromkeys(left_out))
    locate_files(cfg, folder)
    model = build(cfg.model)
    fill_parts(model, [*starting_runs(cfg, folder), folder], quantized, merge, left_out)
    check_tokenizers(model, folder)
    return model.eval(), cfg


def kind_of(cfg: DictConfig) -> str:
    """What the model of a run does.

    Returns:
        `kind` of the model's settings, or `describes` for a vision-language model that was trained on captions alone.
        A user's own model is of the kind of its base; without one, it draws if the run has a noise process, and answers
        if the stage has a prompt; else the kind is empty.
    """
    prompt = cfg.stage.get("prompt")
    kind = getattr(schema_of(cfg.model._target_), "kind", "")
    if not kind and cfg.model.get("_target_") is not None:
        bases = [f"{base.__module__}.{base.__name__}" for base in inspect.getmro(locate(cfg.model._target_))]  # type: ignore[arg-type]
        kinds = [getattr(schema_of(base), "kind", "") for base in bases]
        kind = next(
            filter(None, kinds), "draws" if cfg.process is not None else "answers" if prompt is not None else ""
        )
    if kind == "answers" and prompt is not None and (prompt.template == "plain" or prompt.turns == "caption"):
        return "describes"
    return kind


def run_prompt(cfg: DictConfig, template: str | None = None) -> Prompt:
    """Return the prompt for questions to a run's model: the trained one, or with another template.

    Raises:
        ConfigError: a template without questions.
    """
    return asking(trained_prompt(cfg), template)


def told_prompt(cfg: DictConfig, template: str | None = None) -> Prompt:
    """Return the prompt for questions of a data set: `run_prompt`, for a language model with the caption of an image
    in its place if it was trained so.

    Raises:
        ConfigError: as `run_prompt`.
    """
    prompt, pictures = run_prompt(cfg, template), trained_prompt(cfg).pictures
    if kind_of(cfg) != "writes":
        return prompt
    return replace(prompt, pictures="none" if pictures == "none" else "text")


def description_prompt(cfg: DictConfig, template: str | None = None) -> Prompt:
    """Return the prompt for descriptions by a run's model: the trained one, or with another template.

    Raises:
        ConfigError: an unknown template.
    """
    prompt = replace(trained_prompt(cfg), pictures="tokens", turns="caption")
    return replace(prompt, template=template) if template else prompt


def trained_prompt(cfg: DictConfig) -> Prompt:
    """Return the prompt that a run was trained with."""
    return Prompt(**OmegaConf.to_container(cfg.stage.prompt, resolve=True))  # type: ignore[arg-type]
