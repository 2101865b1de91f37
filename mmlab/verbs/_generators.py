"""From a finished run to the generator that draws its images, with settings from the command line."""

import sys
from math import ceil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mmlab.config.build import build
from mmlab.config.errors import ConfigError
from mmlab.config.schemas import schema_of
from mmlab.data.aspects import Shape, bucket_of, bucket_shapes, shape_name
from mmlab.diffusion.config import SamplerConfig
from mmlab.diffusion.samplers import Sampler
from mmlab.evaluate.pictures.generators import PictureGenerator, picture_generator, steps_from
from mmlab.model.config import CodeSamplerConfig
from mmlab.runs.check import SAMPLER_OPTIONS
from mmlab.stage.assembly import restore
from mmlab.training.ema_snapshots import PostHocAverage, average_of_run

SAMPLERS = {"noise": SamplerConfig, "codes": CodeSamplerConfig}
MODELS = {"noise": "diffusion model", "codes": "code prior"}
SETTINGS = ("steps", "guidance", "temperature", "top_k", "top_p")
"""Keys of the command line that replace a sampler's own settings."""
STRENGTH = 0.8
"""Of image to image, as in diffusers' pipelines."""
OWN = ("eta", "variance")
"""Settings of single samplers, which another sampler does not take over."""


def run_sampler(trained: DictConfig, chosen: DictConfig | None = None, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Return (the sampler of a run, or another one; its settings by name, for records).

    Args:
        trained: the run's config.
        chosen: a sampler's config in place of the run's.
        **settings: any of `SETTINGS`, in place of that sampler's own; None keeps it.

    Raises:
        ConfigError: a sampler or a setting of the other kind of model.
    """
    # A user's own stage does not state how it draws.
    own = "codes" if trained.process is None else "noise"
    source: str = getattr(OmegaConf.get_type(trained.stage), "draws_from", None) or own
    name = trained.run.name
    config = _sampler_config(trained.sampler, chosen, SAMPLERS[source])
    if isinstance(config, dict):  # a user's own sampler
        if changed := [key for key, value in settings.items() if value is not None]:
            raise ConfigError(f"{changed[0]} does not apply to {config['_target_']}; set sampler.<key>=… instead.")
        return build(config), {"sampler": config["_target_"]}
    if not isinstance(config, SAMPLERS[source]):
        raise ConfigError(
            f"{name} is a {MODELS[source]}, which this sampler cannot use; try sampler={SAMPLER_OPTIONS[source]}."
        )
    for key, value in settings.items():
        if value is None:
            continue
        if not hasattr(config, key):
            other = next(MODELS[kind] for kind in SAMPLERS if kind != source)
            raise ConfigError(f"{key} applies only to {other}s; {name} is a {MODELS[source]}.")
        if key == "guidance" and isinstance(config, SamplerConfig):
            config.guidance.scale = value
        else:
            setattr(config, key, value)
    if isinstance(config, SamplerConfig):
        about = {"sampler": config.name, "steps": config.steps, "guidance": config.guidance.scale}
    else:
        about = {key: getattr(config, key) for key in ("temperature", "top_k", "top_p", "guidance")}
    return build(config), about


def _sampler_config(own: DictConfig | None, chosen: DictConfig | None, default: type) -> Any:
    """Return a run's sampler settings with those of a chosen sampler in their place; a dict of a user's own sampler.

    Args:
        own: the run's sampler, or None.
        chosen: what `DrawConfig` keeps of another sampler, or None.
        default: settings of the run's kind of sampler.
    """
    node: Any = OmegaConf.structured(default) if own is None else own
    if chosen is None:
        return OmegaConf.to_object(node)
    kind: Any = schema_of(chosen._target_)
    if kind is None or not issubclass(kind, default):
        return OmegaConf.to_object(chosen if kind is None else OmegaConf.merge(OmegaConf.structured(kind), chosen))
    if OmegaConf.get_type(node) is dict:  # the run has a user's own sampler
        node = OmegaConf.structured(default)
    same = node.get("name") == chosen.get("name")
    settings: Any = OmegaConf.structured(kind)
    for key, value in node.items():
        if same or key not in OWN:
            settings[key] = value
    for key, value in chosen.items():
        if key == "guidance" and default is SamplerConfig:
            settings[key] = OmegaConf.merge(settings[key], value)
        else:  # a clip is replaced as a whole
            settings[key] = value
    return OmegaConf.to_object(settings)


def generator_settings(cfg: DictConfig, trained: DictConfig) -> tuple[Any, Any, dict[str, Any]]:
    """Return (process or None, sampler, the sampler's settings for records) for a run and a command line.

    Raises:
        ConfigError: settings that the run's model does not have.
    """
    sampler, about = run_sampler(trained, cfg.sampler, **{key: cfg[key] for key in SETTINGS})
    process = None if trained.process is None else build(trained.process)
    if process is not None and isinstance(sampler, Sampler):
        sampler.check(process, latents=not str(trained.model.first_stage._target_).endswith(".Identity"))
    return process, sampler, about


def chosen_average(cfg: DictConfig, folder: Path) -> PostHocAverage | None:
    """The averages of a run's weights that `ema` asks for, as `average_of_run`; None without it."""
    return None if cfg.ema is None else average_of_run(folder, cfg.ema)


def restore_with(average: PostHocAverage | None, folder: Path, **options: bool) -> Any:
    """The model of a run, with averages in place of its weights; `options` as for `restore`."""
    model, _ = restore(folder, **options)
    if average is not None:
        average.put_in(model)
    return model


def generator_of(
    model: Any, trained: DictConfig, process: Any, sampler: Any, shape: Shape | None, strength: float = 1.0
) -> PictureGenerator:
    """The generator of a restored model; `shape` None: squares of the trained size."""
    return picture_generator(model, sampler, process, size=shape or trained.data.size, strength=strength)


def shape_of(size: Any, trained: DictConfig) -> Shape:
    """The height and width that `size`, a side or [height, width], asks for; None asks for a square as trained.

    A diffusion model draws squares of its size and, if it was trained with them, its buckets; a prior draws squares of
    its size and larger ones.

    Raises:
        ConfigError: a size that the model cannot draw, or no size.
    """
    own, name = trained.data.size, trained.run.name
    sides = [own] if size is None else list(size) if OmegaConf.is_list(size) else [size]
    if len(sides) not in (1, 2) or not all(type(side) is int and side > 0 for side in sides):
        raise ConfigError(f"size={size} must be a side in pixels, or [height, width].")
    shape = (sides[0], sides[-1])
    if shape == (own, own):
        return shape
    if trained.process is not None:
        buckets = buckets_of(trained)
        if shape in buckets:
            return shape
        if not buckets:
            raise ConfigError(f"{name} draws images of {own} px, the size it was trained on; leave out size.")
        nearby = buckets[bucket_of(shape[1], shape[0], buckets)]
        raise ConfigError(
            f"{name} was not trained on images of {shape_name(shape)} px; its nearest bucket is size={list(nearby)}."
        )
    if shape[0] != shape[1]:
        raise ConfigError(f"{name} is a code prior, which draws squares; give size one side.")
    size = shape[0]
    factor = own // trained.model.prior.side
    if size < own or size % factor:
        raise ConfigError(
            f"{name} was trained on images of {own} px; size={size} must be a multiple of {factor} ≥ {own}."
        )
    return shape


def buckets_of(trained: DictConfig) -> tuple[Shape, ...]:
    """The shapes that a run was trained on; none if it has no buckets."""
    max_aspect = OmegaConf.select(trained, "data.buckets.max_aspect")
    return () if max_aspect is None else bucket_shapes(trained.data.size, max_aspect, trained.data.buckets.step)


def source_settings(cfg: DictConfig, sampler: Any) -> tuple[list[str], list[str], float]:
    """Return (files of images to start from, files of their masks, strength) of a command line.

    Raises:
        ConfigError: a mask or a strength without an image, an image for a code prior, anything but files, or a strength
            that leaves no step.
    """
    images, masks = (_files(key, cfg[key]) for key in ("image", "mask"))
    if not images:
        for key in ("mask", "strength"):
            if cfg[key] is not None:
                raise ConfigError(f"{key}={cfg[key]} needs an image to start from; set image=<file>, or leave it out.")
        return images, masks, 1.0
    strength = cfg.strength or (1.0 if masks else STRENGTH)
    if not isinstance(sampler, Sampler):
        raise ConfigError(
            f"image applies only to diffusion models with a sampler of mmlab; leave it out for {cfg.run}."
        )
    steps = sampler.config.steps
    if not steps_from(steps, strength):
        raise ConfigError(
            f"strength={strength:g} of {steps} steps is no step; raise it to {ceil(1000 / steps) / 1000:g} or more."
        )
    return images, masks, strength


def _files(key: str, value: Any) -> list[str]:
    """A file or a list of files, of a key of the command line."""
    files = [] if value is None else list(value) if OmegaConf.is_list(value) else [value]
    if value is not None and not (files and all(isinstance(file, str | int | float) for file in files)):
        raise ConfigError(f"{key}={value} must be a file, or a list of at least one.")
    return [str(file) for file in files]


def check_guidance(run: str, scale: float, conditioner: Any, trained: DictConfig) -> None:
    """Refuse guidance of an unconditional model, and warn where the unconditional case may be untrained.

    A published denoiser is assumed to have learned that case.

    Raises:
        ConfigError: the model is unconditional.
    """
    if scale == 1:
        return
    if conditioner.reads == "none":
        raise ConfigError(f"{run} is unconditional; guidance has no effect. Set guidance=1.")
    if conditioner.dropout == 0 and OmegaConf.select(trained, "model.denoiser.source") is None:
        print(
            f"caution: {run} was trained with model.conditioner.dropout=0; unless it was initialized from a model that"
            f" had learned the unconditional case, guidance={scale:g} does not help.",
            file=sys.stderr,
        )
