"""Write a trained run as a folder that diffusers and transformers load."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from mmlab.config.compose import hydra_verb
from mmlab.config.errors import ConfigError
from mmlab.verbs.config import DrawConfig

LIBRARIES = {
    "answers": "transformers",
    "describes": "transformers",
    "writes": "transformers",
    "reconstructs": "diffusers",
    "draws": "diffusers",
}
"""The library for a kind of model."""
ADAPTER = "adapter"
"""Subfolder of an adapter that is kept apart."""


def main(argv: list[str]) -> int:
    return hydra_verb("export", export, argv)


def export(cfg: DictConfig) -> None:
    """Write a run for diffusers or transformers; print the line that loads it.

    A LLaVA run becomes a LlavaForConditionalGeneration (LlavaNextForConditionalGeneration with tiles), a MiniGPT-4 run
    a Blip2ForConditionalGeneration, with processor and chat template: `transformers serve` answers questions about
    pictures with the folder.

    A first stage becomes diffusers' autoencoder, a diffusion model a pipeline with the run's sampler (give another one
    if diffusers does not have it), a code prior diffusers' VQModel and transformers' GPT-2, with a loader.

    A LoRA adapter is merged into the weights, or, with merge=false, written in adapter/: as a folder of peft, or, of a
    StableDiffusionPipeline, as one of diffusers.

    mmlab export run=llava/finetune_tiny out=finetune_tiny
    mmlab export run=ldm/class_tiny to=diffusers out=class_tiny
    mmlab export run=ldm/class_tiny ema=0.05                    # averaged weights, of a run with callbacks.posthoc_ema
    mmlab export run=ldm/class_tiny sampler=ddim sampler.spacing=trailing steps=50 guidance=3
    """
    from mmlab.runs.disk import no_file, replacing
    from mmlab.runs.run import find_run, load_run_config
    from mmlab.stage.assembly import kind_of

    folder = find_run(cfg.run, cfg.root)
    kind = kind_of(load_run_config(folder))
    library = LIBRARIES.get(kind)
    if library is None:
        raise ConfigError(
            f"{folder} cannot be exported; transformers takes runs that write text, diffusers those of "
            "stage=autoencoder, latent_diffusion and code_prior."
        )
    if cfg.to not in (None, library):
        raise ConfigError(f"{folder} cannot be exported to {cfg.to}; set to={library}.")
    if not cfg.merge and kind == "reconstructs":
        raise ConfigError(f"merge=false applies only to runs with an adapter; {folder} trained an autoencoder.")
    if cfg.ema is not None and kind != "draws":
        raise ConfigError(f"ema applies only to models that draw images, and {folder} does not; leave it out.")
    out = no_file(Path(cfg.out or folder / "export" / library))
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose another out, or remove that folder.")
    write = {"reconstructs": _first_stage, "draws": _generator}.get(kind, _text)
    with replacing(out) as draft:
        line, differences = write(cfg, folder, kind, draft)
    print(line.replace(str(draft), str(out)))
    for difference in differences:
        print(f"WARNING: in transformers, {difference}", file=sys.stderr)


def _first_stage(cfg: DictConfig, folder: Path, kind: str, draft: Path) -> tuple[str, list[str]]:
    from mmlab.export.diffusion_export import export_first_stage
    from mmlab.stage.assembly import restore

    return export_first_stage(restore(folder)[0].first_stage, draft), []


def _generator(cfg: DictConfig, folder: Path, kind: str, draft: Path) -> tuple[str, list[str]]:
    from mmlab.export.adapters import write_pipeline_adapters
    from mmlab.export.diffusion_export import export_pipeline
    from mmlab.export.prior_export import export_prior
    from mmlab.export.schedulers import scheduler
    from mmlab.runs.run import load_run_config
    from mmlab.verbs._generators import chosen_average, generator_settings, restore_with

    trained = load_run_config(folder)
    process, sampler, _ = generator_settings(cfg, trained)
    if process is not None:
        scheduler(process, sampler)  # refused before weights are loaded
    adapters = {} if cfg.merge else _adapters(folder)
    if adapters and process is None:
        raise ConfigError(f"{folder} is a code prior, whose adapter has no form of its own; leave merge=false out.")
    model = restore_with(chosen_average(cfg, folder), folder, merge=cfg.merge)
    if process is None:
        return export_prior(model, sampler, trained.data.size, draft), []
    line = export_pipeline(model, process, trained.data.size, draft, sampler)
    if adapters:
        if not line.startswith("StableDiffusionPipeline"):
            raise ConfigError(
                f"{folder} is exported as a {line.split('.')[0]}, which cannot load an adapter; leave merge=false out."
            )
        write_pipeline_adapters(adapters, draft / ADAPTER)
        line += f'; its adapter with load_lora_weights("{draft / ADAPTER}")'
    return line, []


def _adapters(folder: Path) -> dict[str, Path]:
    """Part → its artifact, of the adapters that a run trained; raises ConfigError if there are none."""
    from mmlab.training.lora import is_adapter

    adapters = {path.name: path for path in sorted(folder.glob("artifacts/*")) if is_adapter(path)}
    if not adapters:
        raise ConfigError(f"{folder} has no adapter that merge=false could keep apart; leave merge out.")
    return adapters


def _text(cfg: DictConfig, folder: Path, kind: str, draft: Path) -> tuple[str, list[str]]:
    import torch

    from mmlab.export.transformers_export import export_language, export_vision_language
    from mmlab.stage.assembly import description_prompt, restore, run_prompt

    for key in DrawConfig.__dataclass_fields__:
        if cfg[key] is not None:
            raise ConfigError(f"{key} applies only to generative models; {folder} writes text.")
    apart = {} if cfg.merge else _adapters(folder)
    model, trained = restore(folder, quantized=False, merge=cfg.merge)
    # Of captions, which have no questions: the picture alone.
    prompt = (description_prompt if trained.stage.prompt.template == "plain" else run_prompt)(trained)
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(trained.trainer.precision, torch.float32)
    if kind == "writes":
        return export_language(model, prompt, dtype, draft, apart)
    return export_vision_language(model, prompt, trained.data, dtype, draft, apart)
