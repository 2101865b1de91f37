"""Export of a trained diffusion model, or a first stage, as a folder from which diffusers generates the same images."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError
from mmlab.diffusion.edm import EDM, TIME_SCALE
from mmlab.diffusion.process import Diffusion, NoiseProcess
from mmlab.diffusion.samplers import Sampler
from mmlab.export.diffusers_modules import DIT_NULL, autoencoder, transformer, unet
from mmlab.export.schedulers import call_arguments, scheduler
from mmlab.model.autoencoder import KLAutoencoder, VQAutoencoder
from mmlab.model.conditioner import ClassCondition, TextCondition
from mmlab.model.denoiser import DiffusionModel, UNet
from mmlab.model.dit import DiT
from mmlab.model.first_stage import FirstStage, Identity
from mmlab.runs.disk import to_json

INDEX = "model_index.json"
OURS = "mmlab.export.latent_pipeline"
"""The pipeline for models that diffusers has no pipeline for; its file is copied into the folder as pipeline.py."""


def export_first_stage(first_stage: FirstStage, out: Path) -> str:
    """Write an `AutoencoderKL` of normalized latents, or a `VQModel`, and return the line that loads it.

    Raises:
        ConfigError: a first stage that diffusers has no class for.
    """
    exported = autoencoder(first_stage)
    if exported is None:
        raise ConfigError("The run's first stage is pixel space, without weights to export.")
    exported.save_pretrained(out)
    return f'{type(exported).__name__}.from_pretrained("{out}")'


def export_pipeline(model: DiffusionModel, process: NoiseProcess, size: int, out: Path, sampler: Sampler) -> str:
    """Write a whole pipeline and return the line that loads it, with the arguments of its calls.

    A text model with a UNet on KL latents becomes a `StableDiffusionPipeline`, a class model with a DiT on KL latents a
    `DiTPipeline`, and an unconditional one with a UNet on pixels a `DDIMPipeline`. Other class and unconditional models
    use a pipeline of ours, whose code is in the folder (`latent_pipeline.py`); so do those whose sampler or classes the
    other pipelines would treat differently. Its calls take the run's settings by default; the line states what others
    have to be told.

    Args:
        model: the trained model.
        process: that it was trained with.
        size: side of the images.
        out: the folder.
        sampler: of the run.

    Raises:
        ConfigError: parts that no pipeline takes together, or a sampler that diffusers does not have.
    """
    side = model.first_stage.side(size)
    steps = scheduler(process, sampler)
    pipeline = _stock(model, process, side, sampler, steps)
    if pipeline is None:
        return _export_ours(model, process, side, out, sampler, steps)
    pipeline.save_pretrained(out)
    if isinstance(model.conditioner, ClassCondition):
        # DiTPipeline takes names of classes, but does not save them.
        _edit_index(out, id2label=dict(enumerate(model.conditioner.names)))
    arguments = {name: value for name, value in call_arguments(sampler).items() if value}
    if model.conditioner.reads == "none":
        arguments = {name: value for name, value in arguments.items() if not name.startswith("guidance")}
    if sampler.clip is not None:
        arguments["use_clipped_model_output"] = True
    advice = ", ".join(f"{name}={value}" for name, value in arguments.items())
    return f'{type(pipeline).__name__}.from_pretrained("{out}")  # call it with {advice}, as the run samples'


def _stock(model: DiffusionModel, process: NoiseProcess, side: int, sampler: Sampler, steps: Any) -> Any:
    """Return diffusers' own pipeline for such a model, None if it has none that samples as the run does."""
    first_stage, conditioner, denoiser = model.first_stage, model.conditioner, model.denoiser
    if not isinstance(process, Diffusion):
        return None
    if isinstance(conditioner, TextCondition):
        return _stable_diffusion(first_stage, conditioner, denoiser, side, sampler, steps)
    if isinstance(denoiser, DiT) and isinstance(first_stage, KLAutoencoder) and isinstance(conditioner, ClassCondition):
        if not (_plain_guidance(sampler) and sampler.clip is None and _plain(conditioner.names)):
            return None
        from diffusers.pipelines.dit.pipeline_dit import DiTPipeline

        return DiTPipeline(transformer(denoiser, conditioner, side), autoencoder(first_stage), steps)
    if isinstance(denoiser, UNet) and isinstance(first_stage, Identity) and conditioner.reads == "none":
        from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline

        if type(steps).__name__ != "DDIMScheduler":  # DDIMPipeline would replace it
            return None
        return DDIMPipeline(unet(denoiser, conditioner, side), steps)
    return None


def _plain_guidance(sampler: Sampler) -> bool:
    """Whether a pipeline that has only a scale of 1 or more, and adds no noise, samples as the run does."""
    settings = call_arguments(sampler)
    return settings["guidance_scale"] >= 1 and not any(
        settings[name] for name in ("guidance_rescale", "guidance_interval", "eta")
    )


def _plain(names: list[str]) -> bool:
    """Whether DiTPipeline finds classes as `class_index` does: it splits names at commas, and takes any position."""
    positions = [str(n) for n in range(len(names))]
    return names == positions or not any("," in name or name != name.strip() or name[:1].isdigit() for name in names)


def _stable_diffusion(
    first_stage: FirstStage, conditioner: TextCondition, denoiser: Any, side: int, sampler: Sampler, steps: Any
) -> Any:
    guidance = sampler.guidance
    if conditioner.hide_padding:
        raise ConfigError(
            "StableDiffusionPipeline cannot mask padding, but this run did (model.conditioner.hide_padding=true)."
        )
    for setting, used, instead in (
        ("sampler.clip", sampler.clip is not None, "sampler.clip=null"),
        ("sampler.spacing=leading", sampler.config.spacing == "leading", "sampler.spacing=trailing"),
        ("sampler.guidance.interval", guidance.interval is not None, "sampler.guidance.interval=null"),
        (f"sampler.guidance.scale={guidance.scale:g}", guidance.scale < 1, "sampler.guidance.scale=1"),
    ):
        if used:
            raise ConfigError(
                f"StableDiffusionPipeline cannot do what this run's sampler does with {setting}; export with"
                f" sampler={sampler.config.name} and set {instead}."
            )
    if not (isinstance(denoiser, UNet) and isinstance(first_stage, KLAutoencoder)):
        raise ConfigError("StableDiffusionPipeline, for text models, needs a UNet and a KL first stage.")
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    tokenizer = copy.deepcopy(conditioner.tokenizer)
    tokenizer.model_max_length = conditioner.max_length
    return StableDiffusionPipeline(
        vae=autoencoder(first_stage),
        text_encoder=conditioner.encoder,
        tokenizer=tokenizer,  # type: ignore[arg-type]
        unet=unet(denoiser, conditioner, side),
        scheduler=steps,
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def _export_ours(
    model: DiffusionModel, process: NoiseProcess, side: int, out: Path, sampler: Sampler, steps: Any
) -> str:
    from mmlab.export.latent_pipeline import LatentDiffusionPipeline

    first_stage, conditioner, denoiser = model.first_stage, model.conditioner, model.denoiser
    if isinstance(conditioner, TextCondition) or not isinstance(denoiser, UNet | DiT):
        raise ConfigError(
            f"diffusers has no pipeline for {type(denoiser).__name__} with {type(conditioner).__name__} and "
            f"{type(process).__name__}; text models can be exported with process=stable_diffusion, for example."
        )
    names = conditioner.names if isinstance(conditioner, ClassCondition) else None
    raw = isinstance(first_stage, VQAutoencoder)
    pipeline = LatentDiffusionPipeline(
        (unet if isinstance(denoiser, UNet) else transformer)(denoiser, conditioner, side),  # type: ignore[arg-type]
        steps,
        autoencoder(first_stage),
        classes=names,
        null_class=DIT_NULL if isinstance(denoiser, DiT) else len(names or []),
        latents_mean=first_stage.latent_mean.tolist() if raw else None,
        latents_std=first_stage.latent_std.tolist() if raw else None,
        defaults=call_arguments(sampler),
        time_scale=TIME_SCALE if isinstance(process, EDM) else 1,
    )
    pipeline.save_pretrained(out)
    _edit_index(out, _class_name=["pipeline", type(pipeline).__name__])
    copy_code(OURS, out / "pipeline.py")
    return f'DiffusionPipeline.from_pretrained("{out}", trust_remote_code=True)'


def copy_code(module: str, target: Path) -> None:
    """Copy the file of a module into an exported folder, with `class_index` inside if it needs it."""
    code = _code(module).replace("from mmlab.class_names import class_index\n", _code("mmlab.class_names"))
    target.write_text(code, encoding="utf-8")


def _code(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _edit_index(out: Path, **entries: Any) -> None:
    index = json.loads((out / INDEX).read_text())
    (out / INDEX).write_text(to_json({**index, **entries}, indent=2) + "\n")
