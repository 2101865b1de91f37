"""`mmlab shards encode`: shards of latents or codes, by a trained first stage."""

import argparse

from mmlab.config.errors import ConfigError
from mmlab.training.config import STORED_DTYPES
from mmlab.verbs._shard_arguments import add, existing, positive
from mmlab.verbs._shard_build import add_budget, add_destination, write


def add_encode(commands) -> None:
    """Add `encode`."""
    encode = add(commands, "encode", _encode, "encode images with a trained first stage: cache its latents or codes")
    encode.add_argument("run_name", metavar="RUN", help="name or folder of a run that trained or started from it")
    encode.add_argument("source", metavar="SRC", type=existing, help="folder of shards with images")
    encode.add_argument("--runs", default="runs", metavar="DIR", help="folder of runs (%(default)s)")
    help_kind = "what to store; by default codes, for stage=code_prior, if the first stage has a codebook"
    encode.add_argument("--as", dest="kind", choices=("codes", "latents"), help=help_kind)
    help_dtype = "of latents; float16 takes half the space (float32)"
    encode.add_argument("--dtype", choices=STORED_DTYPES, help=help_dtype)
    help_map = "a run that trained a first stage of maps: encode each image's map.png as well"
    encode.add_argument("--map-run", metavar="RUN", help=help_map)
    encode.add_argument("--flip", action="store_true", help="also encode the mirror images, for data.flip=true")
    help_keep = "copy the images beside their latents, for model/alignment"
    encode.add_argument("--keep-images", action="store_true", help=help_keep)
    encode.add_argument("--batch-size", type=positive, default=64, help="images at a time (%(default)s)")
    add_budget(encode.add_argument)
    add_destination(encode.add_argument)


def _encode(args: argparse.Namespace) -> None:
    import torch

    from mmlab.data.index import ShardIndex
    from mmlab.runs.run import find_run
    from mmlab.stage.latent_cache import codes, encoding_of, first_stage_of, latents

    index, folder = ShardIndex.open(args.source), find_run(args.run_name, args.runs)
    kind = encoding_of(folder, args.kind)
    if kind == "latents" and args.map_run is not None:
        raise ConfigError("--map-run applies only to codes, and this encodes latents; leave it out.")
    if kind == "codes" and args.dtype is not None:
        raise ConfigError(f"--dtype={args.dtype} applies only to latents, and this encodes codes; leave it out.")
    if kind == "codes" and args.keep_images:
        raise ConfigError("--keep-images applies only to latents, and this encodes codes; leave it out.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first_stage, spec = first_stage_of(folder, measured=kind == "latents")
    options = args.flip, args.batch_size, args.missing_budget
    if kind == "latents":
        samples = latents(first_stage.to(device), index, spec, args.dtype or "float32", *options, args.keep_images)
    else:
        maps = args.map_run and first_stage_of(find_run(args.map_run, args.runs), measured=False)[0].to(device)
        samples = codes(first_stage.to(device), index, spec, *options, maps)
    write(args, samples, len(index))
