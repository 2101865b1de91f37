"""Write a trained run as a folder that diffusers and transformers load."""

from omegaconf import DictConfig

from mmlab.config.compose import hydra_verb


def main(argv: list[str]) -> int:
    return hydra_verb("export", export, argv)


def export(cfg: DictConfig) -> None:
    """Write a run's first stage, or its whole generative model, for diffusers; print the line that loads it.

    A prior over codes leaves as diffusers' VQModel and transformers' GPT-2, with a loader beside them.

    mmlab export run=ldm/class_tiny to=diffusers out=class_tiny
    """
    from pathlib import Path

    from mmlab.config.build import build
    from mmlab.config.errors import ConfigError
    from mmlab.export.code_run import export_prior
    from mmlab.export.diffusion_run import export_first_stage, export_pipeline
    from mmlab.model.autoencoder import AutoencoderModel
    from mmlab.model.code_prior_model import CodePriorModel
    from mmlab.model.denoiser import DiffusionModel
    from mmlab.runs.disk import no_file
    from mmlab.runs.run import find_run
    from mmlab.stage.assembly import restore, run_code_sampler, run_sampler

    folder = find_run(cfg.run, cfg.root)
    out = no_file(Path(cfg.out or folder / "export" / cfg.to))
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give another out=…, or remove that folder.")
    model, trained = restore(folder)
    if isinstance(model, AutoencoderModel):
        line = export_first_stage(model.first_stage, out)
    elif isinstance(model, DiffusionModel):
        line = export_pipeline(model, build(trained.process), trained.data.size, out, run_sampler(trained).clip)
    elif isinstance(model, CodePriorModel):
        line = export_prior(model, run_code_sampler(trained), trained.data.size, out)
    else:
        raise ConfigError(
            f"{folder} holds a {type(model).__name__}; diffusers takes runs of stage=autoencoder, latent_diffusion and"
            " code_prior."
        )
    print(line)
