"""What the commands of `mmlab shards` share: a parser that complains in one sentence, and common arguments."""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, nearest
from mmlab.data.formats import RESPONSE_TYPES


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one sentence with the nearest right word."""

    def __init__(self, **options):
        super().__init__(formatter_class=partial(argparse.HelpFormatter, max_help_position=28), **options)

    def error(self, message: str):
        raise ConfigError(f"{message}; see `{self.prog} --help`.")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            options = [str(choice) for choice in action.choices]
            raise ConfigError(f"'{value}' is none of {', '.join(options)}.{nearest(str(value), options)}")


def add(commands, name: str, run, summary: str) -> argparse.ArgumentParser:
    """Add a command that `run` carries out, given the parsed arguments."""
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=run, parser=parser)
    return parser


def positive(text: str) -> int:
    """The type of an option that counts something: 1, 2, …"""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be a whole number of at least 1, not {text}")
    return int(text)


def existing(path: str) -> str:
    """Return the path of something that exists, or raise ConfigError with the nearest name beside it."""
    place = Path(path).expanduser()
    if ":" in path or place.exists():  # a URL or a command is refused where folders are opened
        return path
    siblings = [str(other) for other in place.parent.iterdir()] if place.parent.is_dir() else []
    raise ConfigError(f"there is no {path}.{nearest(str(place), siblings)}")


def add_kinds(parser: argparse.ArgumentParser) -> None:
    """Add `--kinds`: shapes to draw."""
    kinds = ("circle", "square", "triangle", "diamond", "star", "cross")
    parser.add_argument("--kinds", nargs="+", default=kinds, metavar="SHAPE", help=f"({' '.join(kinds)})")


def _build(args: argparse.Namespace) -> None:
    from mmlab.data.shards import write_shards

    start = time.monotonic()
    samples = args.convert(args)
    index, counts = write_shards(
        samples, args.out, args.shard_samples, args.overwrite, total=getattr(args, "count", None)
    )
    found = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
    took = time.monotonic() - start
    print(f"{index.root}: {len(index)} samples in {len(index.shards)} shards, {took:.1f} s ({found})")


def _shapes(args: argparse.Namespace):
    from mmlab.data.sources.shapes import shapes

    return shapes(args.count, args.split, args.seed, args.size, args.min_objects, args.max_objects, args.kinds)


def _instructions(args: argparse.Namespace):
    from mmlab.data.sources.drawn_instructions import instructions

    return instructions(args.count, args.types, args.split, args.seed, args.size, args.kinds)


def _easy_vqa(args: argparse.Namespace):
    from mmlab.data.sources.easy_vqa import easy_vqa

    return easy_vqa(existing(args.data), args.split, args.held_out)


def _llava_json(args: argparse.Namespace):
    from mmlab.data.sources.llava_json import llava_json

    return llava_json(existing(args.json), existing(args.images), args.missing_budget, args.type)


def _coco(args: argparse.Namespace):
    from mmlab.data.sources.coco import coco

    captions, instances, table = (path and existing(path) for path in (args.captions, args.instances, args.table))
    return coco(existing(args.images), captions, instances, table, args.missing_budget)


def _scienceqa(args: argparse.Namespace):
    from mmlab.data.sources.scienceqa import scienceqa

    captions = None if args.captions is None else existing(args.captions)
    return scienceqa(existing(args.data), args.split, args.form, captions, args.missing_budget)


def _captions(args: argparse.Namespace):
    from mmlab.data.sources.captions import captions

    table = existing(args.captions) if args.captions else None
    fields = args.image_field, args.caption_field, args.class_field
    return captions(existing(args.images), table, *fields, args.missing_budget)


def _images(args: argparse.Namespace):
    from mmlab.data.sources.picture_folder import images

    table = existing(args.labels) if args.labels else None
    maps = existing(args.maps) if args.maps else None
    return images(existing(args.images), table, args.image_field, args.class_field, args.missing_budget, maps)


def _encoded(args: argparse.Namespace):
    import torch

    from mmlab.data.index import ShardIndex
    from mmlab.runs.run import find_run
    from mmlab.stage.latent_cache import codes, first_stage_of, kind_of, latents

    index = ShardIndex.open(existing(args.source))
    folder = find_run(args.run_name, args.runs)
    kind = kind_of(folder, args.kind)
    first_stage, spec = first_stage_of(folder, measured=kind == "latents")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.count = len(index)
    options = args.flip, args.batch_size, args.missing_budget
    if kind == "latents":
        if args.map_run is not None:
            raise ConfigError("--map-run encodes maps as codes, and this encodes latents; leave it out.")
        return latents(first_stage.to(device), index, spec, args.dtype or "float32", *options)
    if args.dtype is not None:
        raise ConfigError(f"--dtype={args.dtype} is of latents, and this encodes codes; leave it out.")
    maps = None
    if args.map_run is not None:
        maps = first_stage_of(find_run(args.map_run, args.runs), measured=False)[0].to(device)
    return codes(first_stage.to(device), index, spec, *options, maps)


def add_build(commands) -> None:
    """Add `build` with a command of its own for each source."""
    build = commands.add_parser("build", help="convert a foreign format, or draw shapes, into shards")
    sources = build.add_subparsers(title="sources", required=True, metavar="SOURCE")
    for source in (*_drawn(sources), *_dialogues(sources), *_pictures(sources)):
        _add_destination(source)


def _drawn(sources) -> tuple[argparse.ArgumentParser, ...]:
    shapes = add(sources, "shapes", _build, "drawn scenes with captions, boxes, questions and dialogues")
    shapes.add_argument("--min-objects", type=int, default=1, help="(%(default)s)")
    shapes.add_argument("--max-objects", type=int, default=3, help="(%(default)s)")
    shapes.set_defaults(convert=_shapes)

    summary = "drawn scenes of one object with dialogues of LLaVA's three response types"
    instructions = add(sources, "instructions", _build, summary)
    help_types = f"response types, in turn ({' '.join(RESPONSE_TYPES)})"
    instructions.add_argument("--types", nargs="+", default=RESPONSE_TYPES, metavar="TYPE", help=help_types)
    instructions.set_defaults(convert=_instructions)

    for source in (shapes, instructions):
        source.add_argument("--count", type=int, default=2000, help="samples (%(default)s)")
        source.add_argument("--split", default="train", help="a word that makes another stream (%(default)s)")
        source.add_argument("--seed", type=int, default=0, help="(%(default)s)")
        source.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (%(default)s)")
        add_kinds(source)
    return shapes, instructions


def _dialogues(sources) -> tuple[argparse.ArgumentParser, ...]:
    easy_vqa = add(sources, "easy_vqa", _build, "the easy-VQA data set")
    easy_vqa.add_argument("data", help="folder that holds easy_vqa/data")
    easy_vqa.add_argument("--split", default="train", choices=("train", "val", "test"), help="(%(default)s)")
    easy_vqa.add_argument("--held-out", type=int, default=0, metavar="N", help="every Nth train picture makes up val")
    easy_vqa.set_defaults(convert=_easy_vqa)

    llava = add(sources, "llava_json", _build, "LLaVA's JSON list of conversations and its pictures")
    llava.add_argument("json", help="such as llava_instruct_150k.json")
    llava.add_argument("images", help="folder that the entries' pictures are in")
    llava.add_argument("--type", help="response type of entries that name none, such as conversation")
    llava.set_defaults(convert=_llava_json)

    coco = add(sources, "coco", _build, "pictures with COCO's captions and boxes")
    coco.add_argument("images", help="picture folder")
    coco.add_argument("--captions", metavar="JSON", help="such as captions_train2017.json")
    coco.add_argument("--instances", metavar="JSON", help="such as instances_train2017.json")
    coco.add_argument("--table", metavar="JSONL", help="captions and boxes of one picture a line, in place of both")
    coco.set_defaults(convert=_coco)

    scienceqa = add(sources, "scienceqa", _build, "ScienceQA in its official layout, in LLaVA's single-turn form")
    scienceqa.add_argument("data", help="folder of problems.json, pid_splits.json and, where there are, images/<split>")
    scienceqa.add_argument("--split", default="train", help="train, val, test, minival, … (%(default)s)")
    forms = ("QCM-LEA", "QCM-ALE")
    scienceqa.add_argument("--form", default=forms[0], choices=forms, help="reasoning first, or answer first: QCM-ALE")
    scienceqa.add_argument("--captions", metavar="JSON", help="captions of the pictures, to stand in the context")
    scienceqa.set_defaults(convert=_scienceqa)
    _add_budget(llava)
    _add_budget(coco)
    # A problem whose picture is missing is kept as text.
    _add_budget(scienceqa, 1.0)
    return easy_vqa, llava, coco, scienceqa


def _pictures(sources) -> tuple[argparse.ArgumentParser, ...]:
    captions = add(sources, "captions", _build, "pictures with captions in .txt beside them, or in a table")
    captions.add_argument("images", help="picture folder")
    captions.add_argument(
        "--captions", metavar="TABLE", help=".csv, .tsv or .jsonl; without it x.txt lies beside x.jpg"
    )
    captions.add_argument("--caption-field", help="the table's column of captions")
    captions.set_defaults(convert=_captions)

    images = add(sources, "images", _build, "pictures with classes: a sub-folder for each class, or a table")
    images.add_argument("images", help="picture folder")
    images.add_argument("--labels", metavar="TABLE", help=".csv, .tsv or .jsonl; without it sub-folders are classes")
    images.add_argument("--maps", metavar="DIR", help="a PNG of the same path for each picture, such as a segmentation")
    images.set_defaults(convert=_images)

    for source in (captions, images):
        source.add_argument("--image-field", help="the table's column of picture paths")
        source.add_argument("--class-field", help="the table's column of classes")
        _add_budget(source)
    return captions, images


def add_encode(commands) -> None:
    """Add `encode`."""
    summary = "encode pictures with a trained first stage: a cache of its latents or codes"
    encode = add(commands, "encode", _build, summary)
    encode.add_argument("run_name", metavar="RUN", help="name or folder of a run that trained or started from it")
    encode.add_argument("source", metavar="SRC", help="folder of shards with pictures")
    encode.add_argument("--runs", default="runs", metavar="DIR", help="folder of runs (%(default)s)")
    help_kind = "what to keep; without it codes, where the first stage has a codebook, for stage=code_prior"
    encode.add_argument("--as", dest="kind", choices=("codes", "latents"), help=help_kind)
    help_dtype = "of the latents; float16 takes half the space (float32)"
    encode.add_argument("--dtype", choices=("float32", "float16"), help=help_dtype)
    help_map = "a run that trained a first stage of maps: encode each picture's map.png, too"
    encode.add_argument("--map-run", metavar="RUN", help=help_map)
    encode.add_argument("--flip", action="store_true", help="encode the mirror images too, for data.flip=true")
    encode.add_argument("--batch-size", type=positive, default=64, help="pictures at a time (%(default)s)")
    encode.set_defaults(convert=_encoded)
    _add_budget(encode)
    _add_destination(encode)


def _add_budget(parser: argparse.ArgumentParser, share: float = 0.0) -> None:
    help_budget = "share of pictures that may be missing (%(default)s)"
    parser.add_argument("--missing-budget", type=float, default=share, metavar="SHARE", help=help_budget)


def _add_destination(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--shard-samples", type=int, default=1000, help="samples per shard (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier set of shards")
