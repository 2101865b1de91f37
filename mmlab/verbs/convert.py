"""Convert a checkpoint of another code base into a folder that a run can start from."""

import argparse
import sys
from pathlib import Path

from mmlab.config.errors import ConfigError, nearest


def main(argv: list[str]) -> int:
    """Convert a VQ autoencoder of taming-transformers or latent diffusion.

    mmlab convert taming vqgan_imagenet_f16_1024.ckpt first_stages/vqgan_f16_1024

    Raises:
        ConfigError: a wrong command line, a checkpoint of something else, or a folder that is not empty.
    """
    parser = argparse.ArgumentParser(
        prog="mmlab convert", description="Convert a checkpoint into the folder of a first stage."
    )
    parser.add_argument("kind", help="taming: VQ autoencoders of taming-transformers and latent diffusion")
    parser.add_argument("checkpoint", help=".ckpt or .safetensors; no code in it is executed")
    parser.add_argument("out", help="folder to create, for model.first_stage.source")
    help_fixed = "weight the commitment term by beta from now on, not the codebook term as in its training"
    parser.add_argument("--not-legacy", action="store_true", help=help_fixed)
    parser.error = _refuse  # type: ignore[method-assign]
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # after --help
        return int(stop.code or 0)
    if args.kind != "taming":
        raise ConfigError(f"mmlab convert knows taming, not '{args.kind}'.{nearest(args.kind, ['taming'])}")
    convert(Path(args.checkpoint), Path(args.out), legacy=not args.not_legacy)
    return 0


def convert(checkpoint: Path, out: Path, legacy: bool) -> None:
    """Write the folder, and print the config that loads it."""
    from omegaconf import OmegaConf

    from mmlab.model.taming_checkpoint import from_taming, read_taming, settings_of
    from mmlab.runs.disk import replacing
    from mmlab.training.artifacts import write_card

    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; choose another folder, or remove it.")
    if checkpoint.is_dir():
        raise ConfigError(f"{checkpoint} is a folder; name the .ckpt or .safetensors file in it.")
    if not checkpoint.is_file():
        siblings = [str(path) for path in checkpoint.parent.glob("*")] if checkpoint.parent.is_dir() else []
        raise ConfigError(f"There is no file {checkpoint}.{nearest(str(checkpoint), siblings)}")
    model = from_taming(read_taming(checkpoint), checkpoint, legacy)
    with replacing(out) as draft:
        model.save(draft)
        write_card(draft, {"part": "first_stage", "class": type(model).__name__})
    settings = {**settings_of(model), "source": str(out)}
    count = sum(p.numel() for p in model.parameters())
    print(f"{out}: {count:,} parameters; stage=latent_diffusion will measure its latents")
    print(OmegaConf.to_yaml({"model": {"first_stage": settings}}).rstrip())


def _refuse(message: str) -> None:
    raise ConfigError(f"{message}; see `mmlab convert --help`.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
