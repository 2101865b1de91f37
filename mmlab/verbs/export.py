"""Write a trained run as a folder that diffusers and transformers load."""

from omegaconf import DictConfig

from mmlab.config.compose import hydra_verb


def main(argv: list[str]) -> int:
    return hydra_verb("export", export, argv)


def export(cfg: DictConfig) -> None:
    """Write a run's first stage, or its whole generative model, for diffusers; print the line that loads it.

    A code prior is written as diffusers' VQModel and transformers' GPT-2, with a loader.

    The pipeline has the run's sampler; give another one if diffusers does not have it.

    mmlab export run=ldm/class_tiny to=diffusers out=class_tiny
    mmlab export run=ldm/class_tiny sampler=ddim sampler.spacing=trailing steps=50 guidance=3
    """
    from pathlib import Path

    from mmlab.config.errors import ConfigError
    from mmlab.export.diffusion_export import export_first_stage, export_pipeline
    from mmlab.export.prior_export import export_prior
    from mmlab.export.schedulers import scheduler
    from mmlab.runs.disk import no_file, replacing
    from mmlab.runs.run import find_run, load_run_config
    from mmlab.stage.assembly import kind_of, restore
    from mmlab.verbs._generators import generator_settings

    folder = find_run(cfg.run, cfg.root)
    out = no_file(Path(cfg.out or folder / "export" / cfg.to))
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose another out, or remove that folder.")
    kind = kind_of(load_run_config(folder))
    if kind not in ("reconstructs", "draws"):
        raise ConfigError(
            f"{folder} cannot be exported; diffusers takes runs of stage=autoencoder, latent_diffusion and code_prior."
        )
    if kind == "reconstructs":
        first_stage = restore(folder)[0].first_stage
        with replacing(out) as draft:
            line = export_first_stage(first_stage, draft)
        print(line.replace(str(draft), str(out)))
        return
    trained = load_run_config(folder)
    process, sampler, _ = generator_settings(cfg, trained)
    if process is not None:
        scheduler(process, sampler)  # refused before weights are loaded
    model, _ = restore(folder)
    with replacing(out) as draft:
        if process is None:
            line = export_prior(model, sampler, trained.data.size, draft)
        else:
            line = export_pipeline(model, process, trained.data.size, draft, sampler)
    print(line.replace(str(draft), str(out)))
