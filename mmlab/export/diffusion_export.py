"""Export of a trained diffusion model, or a first stage, as a folder from which diffusers generates the same images."""

import copy
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError
from mmlab.diffusion.guidance import Clip
from mmlab.diffusion.process import Diffusion, NoiseProcess
from mmlab.export.diffusers_modules import DIT_NULL, autoencoder, scheduler, transformer, unet
from mmlab.model.autoencoder import KLAutoencoder, VQAutoencoder
from mmlab.model.conditioner import ClassCondition, TextCondition
from mmlab.model.denoiser import DiffusionModel, UNet
from mmlab.model.dit import DiT
from mmlab.model.first_stage import FirstStage, Identity

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


def export_pipeline(
    model: DiffusionModel, process: NoiseProcess, size: int, out: Path, clip: Clip | None = None
) -> str:
    """Write a whole pipeline and return the line that loads it.

    A text model with a UNet on KL latents becomes a `StableDiffusionPipeline`, a class model with a DiT on KL latents a
    `DiTPipeline`, and an unconditional one with a UNet on pixels a `DDIMPipeline`. Other class and unconditional models
    use a pipeline of ours, whose code is in the folder (`latent_pipeline.py`); so does a DiT with a clip, because
    `DiTPipeline` cannot make the noise consistent with the clipped sample. `DDIMPipeline` can; the line says how.

    Args:
        model: the trained model.
        process: that it was trained with.
        size: side of the images.
        out: the folder.
        clip: of the run's sampler.

    Raises:
        ConfigError: parts that no pipeline takes together.
    """
    side = model.first_stage.side(size)
    pipeline = _stock(model, process, side, clip)
    if pipeline is None:
        return _export_ours(model, process, side, out, clip)
    pipeline.save_pretrained(out)
    if isinstance(model.conditioner, ClassCondition):
        # DiTPipeline takes names of classes, but does not save them.
        _edit_index(out, id2label=dict(enumerate(model.conditioner.names)))
    advice = "" if clip is None else "  # call it with use_clipped_model_output=True, as our sampler does"
    return f'{type(pipeline).__name__}.from_pretrained("{out}"){advice}'


def _stock(model: DiffusionModel, process: NoiseProcess, side: int, clip: Clip | None) -> Any:
    """Return diffusers' own pipeline for such a model, None if it has none."""
    first_stage, conditioner, denoiser = model.first_stage, model.conditioner, model.denoiser
    if not isinstance(process, Diffusion):
        return None
    if isinstance(conditioner, TextCondition):
        return _stable_diffusion(first_stage, conditioner, denoiser, process, side, clip)
    if isinstance(denoiser, DiT) and isinstance(first_stage, KLAutoencoder) and clip is None:
        from diffusers.pipelines.dit.pipeline_dit import DiTPipeline

        network = transformer(denoiser, conditioner, side)
        return DiTPipeline(network, autoencoder(first_stage), scheduler(process))
    if isinstance(denoiser, UNet) and isinstance(first_stage, Identity) and conditioner.reads == "none":
        from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline

        return DDIMPipeline(unet(denoiser, conditioner, side), scheduler(process, clip))
    return None


def _stable_diffusion(
    first_stage: FirstStage, conditioner: TextCondition, denoiser: Any, process: Diffusion, side: int, clip: Clip | None
) -> Any:
    if conditioner.hide_padding:
        raise ConfigError(
            "StableDiffusionPipeline cannot mask padding, but this run did (model.conditioner.hide_padding=true)."
        )
    if not isinstance(denoiser, UNet) or not isinstance(first_stage, KLAutoencoder):
        raise ConfigError("StableDiffusionPipeline, for text models, needs a UNet and a KL first stage.")
    if clip is not None:
        raise ConfigError(
            "StableDiffusionPipeline cannot clip, but this run's sampler does; latents have no bounds, so set"
            " sampler.clip=null in the run's config.yaml."
        )
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    tokenizer = copy.deepcopy(conditioner.tokenizer)
    tokenizer.model_max_length = conditioner.max_length
    return StableDiffusionPipeline(
        vae=autoencoder(first_stage),
        text_encoder=conditioner.encoder,
        tokenizer=tokenizer,  # type: ignore[arg-type]
        unet=unet(denoiser, conditioner, side),
        scheduler=scheduler(process),
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def _export_ours(model: DiffusionModel, process: NoiseProcess, side: int, out: Path, clip: Clip | None) -> str:
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
        scheduler(process, clip),
        autoencoder(first_stage),
        classes=names,
        null_class=DIT_NULL if isinstance(denoiser, DiT) else len(names or []),
        latents_mean=first_stage.latent_mean.tolist() if raw else None,
        latents_std=first_stage.latent_std.tolist() if raw else None,
    )
    pipeline.save_pretrained(out)
    _edit_index(out, _class_name=["pipeline", type(pipeline).__name__])
    copy_code(OURS, out / "pipeline.py")
    return f'DiffusionPipeline.from_pretrained("{out}", trust_remote_code=True)'


def copy_code(module: str, target: Path) -> None:
    """Copy the file of a module that does not need mmlab into an exported folder."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    shutil.copyfile(spec.origin, target)


def _edit_index(out: Path, **entries: Any) -> None:
    index = json.loads((out / INDEX).read_text())
    (out / INDEX).write_text(json.dumps({**index, **entries}, indent=2) + "\n")
