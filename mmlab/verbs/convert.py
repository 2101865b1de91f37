"""Convert a checkpoint of another code base into a folder that a run can start from."""

import argparse
import sys
from pathlib import Path

from mmlab.config.errors import ConfigError, nearest
from mmlab.data.config import ASPECTS
from mmlab.runs.check import looks_local

KINDS = {
    "llava": "LLaVA (also NeXT), in its own layout or that of transformers: a run to evaluate or to start from",
    "taming": "VQ autoencoders of taming-transformers and latent diffusion: the folder of a first stage",
}


def main(argv: list[str]) -> int:
    """Convert a checkpoint; no code in it is executed.

    mmlab convert llava liuhaotian/llava-v1.5-7b runs/llava-v1.5-7b
    mmlab convert taming vqgan_imagenet_f16_1024.ckpt first_stages/vqgan_f16_1024

    Raises:
        ConfigError: a wrong command line, a checkpoint of something else, or a folder that is not empty.
    """
    if argv and not argv[0].startswith("-") and argv[0] not in KINDS:
        known = " and ".join(KINDS)
        raise ConfigError(f"mmlab convert knows {known}, not '{argv[0]}'.{nearest(argv[0], KINDS)}")
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # after --help
        return int(stop.code or 0)
    out: Path = args.out
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; choose another folder, or remove it.")
    on_hub = args.kind == "llava" and "/" in str(args.checkpoint) and not looks_local(str(args.checkpoint))
    if not args.checkpoint.exists() and not on_hub:
        folder = args.checkpoint.parent
        siblings = [str(path) for path in folder.glob("*")] if folder.is_dir() else []
        raise ConfigError(f"There is no checkpoint {args.checkpoint}.{nearest(str(args.checkpoint), siblings)}")
    (llava if args.kind == "llava" else taming)(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmlab convert", description="Convert a checkpoint of another code base.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="kind")
    each = {kind: kinds.add_parser(kind, help=text, description=f"Convert {text}.") for kind, text in KINDS.items()}
    for kind in (parser, *each.values()):
        kind.error = _refuse  # type: ignore[method-assign]
    for kind, what, where in (
        ("llava", "folder or hub name of a model, a LoRA or a projector", "folder of the run to create"),
        ("taming", ".ckpt or .safetensors", "folder to create, for model.first_stage.source"),
    ):
        each[kind].add_argument("checkpoint", type=Path, help=what)
        each[kind].add_argument("out", type=Path, help=where)
    own = each["llava"].add_argument
    own("--base", metavar="SOURCE", help="language model of a LoRA or a projector: its folder, or a hub name")
    own("--vision", metavar="SOURCE", help="vision tower, instead of the one that the checkpoint names")
    own("--template", help="of the prompt, such as v0 or v1, instead of the one that fits the checkpoint")
    own("--aspect", choices=ASPECTS, help="how images become square, instead of what the checkpoint says")
    help_fixed = "weight the commitment term by beta from now on, not the codebook term as in its training"
    each["taming"].add_argument("--not-legacy", action="store_true", help=help_fixed)
    return parser


def llava(args: argparse.Namespace) -> None:
    """Write a run, and print what it holds and what to do with it."""
    from mmlab.verbs._llava_run import Choices, convert_llava, summary

    cfg = convert_llava(args.checkpoint, args.out, Choices(args.base, args.vision, args.template, args.aspect))
    print(summary(args.out, cfg))


def taming(args: argparse.Namespace) -> None:
    """Write the folder, and print the config that loads it."""
    from omegaconf import OmegaConf

    from mmlab.model.taming_checkpoint import from_taming, read_taming, settings_of
    from mmlab.runs.disk import replacing
    from mmlab.training.artifacts import write_card

    checkpoint, out = args.checkpoint, args.out
    if checkpoint.is_dir():
        raise ConfigError(f"{checkpoint} is a folder; name the .ckpt or .safetensors file in it.")
    model = from_taming(read_taming(checkpoint), checkpoint, legacy=not args.not_legacy)
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
