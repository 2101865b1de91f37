"""From a config, or from a finished run, to a stage, its data and its model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mmlab.config.build import build
from mmlab.config.errors import ConfigError
from mmlab.config.fields import schema_fields
from mmlab.data.conversation import Prompt, asking
from mmlab.data.module import ShardDataModule
from mmlab.diffusion.samplers import Sampler
from mmlab.model.activation_checkpointing import checkpoint_activations
from mmlab.model.code_sampling import CodeSampler
from mmlab.runs.run import find_run, load_run_config
from mmlab.training.artifacts import load_parts


def build_stage(cfg: DictConfig) -> Any:
    """Build model, optimiser and the stage around them.

    Raises:
        ConfigError: parts that cannot be built or loaded, or that do not fit.
    """
    given: dict[str, Any] = {}
    if "prompt" in cfg.stage:
        given["prompt"] = Prompt(**OmegaConf.to_container(cfg.stage.prompt, resolve=True))  # type: ignore[arg-type]
    for name in ("process", "sampler"):
        if cfg.get(name) is not None:
            given[name] = build(cfg[name])
    runs = [str(find_run(run, cfg.run.root)) for run in cfg.stage.init_from]
    model = build(cfg.model)
    if cfg.trainer.gradient_checkpointing:
        checkpoint_activations(model)
    return build(cfg.stage, model=model, optim=build(cfg.optim), init_from=runs, **given)


def build_data(cfg: DictConfig, stage: Any) -> ShardDataModule:
    """Build the data module with the stage's collate.

    Raises:
        ConfigError, DataError: sources that cannot be opened, or settings that the stage's batches do not have.
    """
    # The settings that shape a batch: the stage that receives it interprets them.
    shape = [name for name, field in schema_fields(cfg.data).items() if field.metadata.get("verb") and name != "root"]
    options = {name: cfg.data[name] for name in shape}
    node = {key: value for key, value in cfg.data.items() if key not in (*shape, "root")}
    node["train"], node["val"] = sources(cfg, "train"), sources(cfg, "val")
    return build(node, collate=stage.collate(**options))


def sources(cfg: DictConfig, split: str) -> list[dict[str, Any]]:
    """The sources of a split, their paths resolved against `data.root`."""
    found = [dict(source) for source in cfg.data[split]]
    return [{**source, "path": str(Path(cfg.data.root) / source["path"])} for source in found]


def restore(folder: Path) -> tuple[Any, DictConfig]:
    """Return (the trained model in eval mode, the run's config).

    Parts come from the runs that this one started from, then from its own artifacts.

    Raises:
        ConfigError: the run has not finished, or a run that it started from is gone.
    """
    cfg = load_run_config(folder)
    model = build(cfg.model)
    runs = [find_run(run, cfg.run.root) for run in cfg.stage.init_from]
    load_parts(model, [*runs, folder])
    return model.eval(), cfg


def run_sampler(
    cfg: DictConfig, chosen: DictConfig | None = None, steps: int | None = None, guidance: float | None = None
) -> Sampler:
    """The sampler of a run's config, or another one.

    Args:
        cfg: the run's config.
        chosen: a sampler's config in place of the run's.
        steps: in place of that sampler's own.
        guidance: scale, likewise.

    Raises:
        ConfigError: settings that the sampler does not have.
    """
    node = cfg.sampler if chosen is None else chosen
    sampler = Sampler() if node is None else build(node)
    if not isinstance(sampler, Sampler):
        raise ConfigError("sampler=codes writes codes, and the run's model takes noise away; give sampler=ddim, say.")
    if steps is not None:
        sampler.steps = steps
    if guidance is not None:
        sampler.guidance.scale = guidance
    return sampler


def run_code_sampler(cfg: DictConfig, chosen: DictConfig | None = None, **given: Any) -> CodeSampler:
    """The sampler of the config of a prior over codes, or another one.

    Args:
        cfg: the run's config.
        chosen: a sampler's config in place of the run's.
        **given: settings in place of that sampler's own; None leaves one.

    Raises:
        ConfigError: a sampler of noise.
    """
    node = cfg.sampler if chosen is None else chosen
    sampler = CodeSampler() if node is None else build(node)
    if not isinstance(sampler, CodeSampler):
        raise ConfigError("The run's model writes codes, and takes no noise away; give sampler=codes, or leave it out.")
    return replace(sampler, **{name: value for name, value in given.items() if value is not None})


def run_prompt(cfg: DictConfig, template: str | None = None) -> Prompt:
    """The prompt that a run was trained with, or the same with another template.

    Raises:
        ConfigError: a template without questions, which cannot ask anything.
    """
    trained = OmegaConf.to_container(cfg.stage.prompt, resolve=True)
    return asking(Prompt(**trained), template)  # type: ignore[arg-type]


def learned_captions(cfg: DictConfig) -> bool:
    """Whether a run learned to describe pictures, and not to answer questions about them."""
    return cfg.stage.prompt.template == "plain" or cfg.stage.prompt.get("turns") == "caption"


def description_prompt(cfg: DictConfig, template: str | None = None) -> Prompt:
    """The prompt in which a run is asked for descriptions: as it was trained, or in another template.

    Raises:
        ConfigError: an unknown template.
    """
    trained = OmegaConf.to_container(cfg.stage.prompt, resolve=True)
    prompt = replace(Prompt(**trained), pictures="tokens", turns="caption")  # type: ignore[arg-type]
    return replace(prompt, template=template) if template else prompt
