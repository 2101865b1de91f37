"""From a config, or from a finished run, to a stage, its data and its model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mmlab.config.build import build
from mmlab.config.errors import ConfigError
from mmlab.data.config import Prompt
from mmlab.data.conversation import asking
from mmlab.data.module import ShardDataModule
from mmlab.diffusion.config import SamplerConfig
from mmlab.diffusion.samplers import Sampler
from mmlab.model.activation_checkpointing import checkpoint_activations
from mmlab.model.code_sampling import CodeSampler
from mmlab.model.config import CodeSamplerConfig
from mmlab.runs.run import find_run, load_run_config
from mmlab.training.artifacts import fill_parts


def build_stage(cfg: DictConfig) -> Any:
    """Build model, optimiser and the stage around them.

    Raises:
        ConfigError: parts that cannot be built or loaded, or that do not fit.
    """
    given: dict[str, Any] = {}
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
    config = OmegaConf.to_object(cfg.data)
    # TRANSITION
    import inspect

    names = list(inspect.signature(stage.collate).parameters)
    collate = stage.collate(config) if names == ["data"] else stage.collate(**{n: getattr(config, n) for n in names})
    if next(iter(inspect.signature(ShardDataModule).parameters)) != "config":
        config.train, config.val = (
            [{"path": str(Path(config.root, s.path)), "weight": s.weight, "name": s.name} for s in split]
            for split in (config.train, config.val)
        )
    return build(config, collate=collate)


def restore(folder: Path) -> tuple[Any, DictConfig]:
    """Return (the trained model in eval mode, the run's config).

    Parts come from the runs that this one started from, then from its own artifacts.

    Raises:
        ConfigError: the run has not finished, or a run that it started from is gone.
    """
    cfg = load_run_config(folder)
    model = build(cfg.model)
    runs = [find_run(run, cfg.run.root) for run in cfg.stage.init_from]
    fill_parts(model, [*runs, folder])
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
    sampler = Sampler(SamplerConfig()) if node is None else build(node)
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
    sampler = CodeSampler(CodeSamplerConfig()) if node is None else build(node)
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
