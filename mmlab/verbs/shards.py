"""`mmlab shards`: make, check and look at the shards that training reads."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, UserError, nearest

# Imports of torch, Pillow and transformers stand in the commands that need them: `--help` answers at once.


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mmlab shards …` and return the exit code: 0, 1 for broken data, 2 for a command that cannot be."""
    try:
        args = _parse(sys.argv[1:] if argv is None else list(argv))
        args.run(args)
    except UserError as error:
        print(f"mmlab shards: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:  # argparse after --help
        return int(stop.code or 0)
    return 0


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

    return easy_vqa(_existing(args.data), args.split, args.held_out)


def _llava_json(args: argparse.Namespace):
    from mmlab.data.sources.llava_json import llava_json

    return llava_json(_existing(args.json), _existing(args.images), args.missing_budget, args.type)


def _coco(args: argparse.Namespace):
    from mmlab.data.sources.coco import coco

    captions, instances, table = (path and _existing(path) for path in (args.captions, args.instances, args.table))
    return coco(_existing(args.images), captions, instances, table, args.missing_budget)


def _scienceqa(args: argparse.Namespace):
    from mmlab.data.sources.scienceqa import scienceqa

    captions = None if args.captions is None else _existing(args.captions)
    return scienceqa(_existing(args.data), args.split, args.form, captions, args.missing_budget)


def _captions(args: argparse.Namespace):
    from mmlab.data.sources.captions import captions

    table = _existing(args.captions) if args.captions else None
    fields = args.image_field, args.caption_field, args.class_field
    return captions(_existing(args.images), table, *fields, args.missing_budget)


def _images(args: argparse.Namespace):
    from mmlab.data.sources.images import images

    table = _existing(args.labels) if args.labels else None
    maps = _existing(args.maps) if args.maps else None
    return images(_existing(args.images), table, args.image_field, args.class_field, args.missing_budget, maps)


def _encoded(args: argparse.Namespace):
    import torch

    from mmlab.config.run import find_run
    from mmlab.data.index import ShardIndex
    from mmlab.stage.code_cache import codes, kind_of
    from mmlab.stage.latent_cache import first_stage_of, latents

    index = ShardIndex.open(_existing(args.source))
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


def _index(args: argparse.Namespace) -> None:
    from mmlab.data.index import build_index

    index = build_index(_existing(args.root), args.require, args.workers)
    print(f"{index.root}: {len(index)} samples in {len(index.shards)} shards are whole; index {index.hash[:12]}")


def _verify(args: argparse.Namespace) -> None:
    from mmlab.data.shards import verify

    index = verify(_existing(args.root), args.workers)
    size = index.shard_sizes.sum() / 1e6
    print(f"{index.root}: {len(index)} samples in {len(index.shards)} shards, all {size:.1f} MB as indexed")


def _stats(args: argparse.Namespace) -> None:
    from mmlab.data.index import ShardIndex
    from mmlab.data.shards import stats

    summary = stats(ShardIndex.open(_existing(args.root)))
    if args.json:
        print(json.dumps(summary))
        return
    for name, value in summary.items():
        if isinstance(value, dict):
            value = "  ".join(f"{key} {number:g}" for key, number in value.items())
        print(f"{name.replace('_', ' '):<22} {'-' if value is None else value}")


def _show(args: argparse.Namespace) -> None:
    from mmlab.data.index import ShardIndex
    from mmlab.report.samples import sample_sheet

    out = Path(args.out)
    if out.suffix != ".png" or not out.parent.is_dir():
        raise ConfigError(f"--out must be a .png in an existing folder, not {out}.")
    index = ShardIndex.open(_existing(args.root))
    sample_sheet(index, args.number, args.columns).save(out)
    print(f"{out}: {min(args.number, len(index))} of {len(index)} samples of {index.root}")


def _problems(args: argparse.Namespace) -> None:
    from mmlab.data.sources.drawn_problems import write_problems

    counts = {split: getattr(args, split) for split in ("train", "val", "test")}
    counts = write_problems(args.out, counts, args.seed, args.size, args.kinds, args.own_letters)
    print(f"{args.out}: {counts['problems']} problems, {counts['pictures']} of them about a picture")


def _tokenizer(args: argparse.Namespace) -> None:
    from mmlab.data.index import ShardIndex
    from mmlab.data.tokenizer import train_tokenizer

    indexes = [ShardIndex.open(_existing(root)) for root in args.roots]
    tokenizer = train_tokenizer(indexes, args.out, args.vocab_size, args.text)
    print(f"{args.out}: {len(tokenizer)} tokens from {sum(map(len, indexes))} samples")


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are one sentence with the nearest right word."""

    def __init__(self, **options):
        super().__init__(formatter_class=partial(argparse.HelpFormatter, max_help_position=28), **options)

    def error(self, message: str):
        raise ConfigError(f"{message}; see `{self.prog} --help`.")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            options = [str(choice) for choice in action.choices]
            raise ConfigError(f"'{value}' is none of {', '.join(options)}.{nearest(str(value), options)}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="mmlab shards", description="Make, check and look at the shards that training reads.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_build(commands)
    _add_encode(commands)
    index = _add(commands, "index", _index, "verify foreign or changed tars and write the index beside them")
    index.add_argument("root", help="folder of .tar files; others in it are left alone")
    help_require = "a member that each sample must have, such as json or 'jpg|png' (may be repeated)"
    index.add_argument("--require", action="append", default=[], metavar="EXT", help=help_require)
    verify = _add(commands, "verify", _verify, "read every byte again and compare it with the index")
    verify.add_argument("root")
    for command in (index, verify):
        command.add_argument("--workers", type=int, default=1, help="processes that read side by side (%(default)s)")
    stats = _add(commands, "stats", _stats, "sizes, members, pictures and text lengths")
    stats.add_argument("root")
    stats.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    show = _add(commands, "show", _show, "a contact sheet of samples with their texts")
    show.add_argument("root")
    show.add_argument("--out", default="samples.png", metavar="PNG", help="where to (%(default)s)")
    help_number = "samples, spread over the set (%(default)s)"
    show.add_argument("-n", dest="number", type=_positive, default=16, help=help_number)
    show.add_argument("--columns", type=_positive, default=4, help="(%(default)s)")
    problems = _add(commands, "problems", _problems, "write made problems in ScienceQA's layout, about drawn scenes")
    problems.add_argument("out", help="folder to make")
    for split, count in (("train", 2000), ("val", 200), ("test", 400)):
        problems.add_argument(f"--{split}", type=int, default=count, metavar="N", help="problems (%(default)s)")
    problems.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    problems.add_argument("--size", type=_positive, default=64, help="side of the pictures in pixels (%(default)s)")
    _add_kinds(problems)
    help_letters = "each color and each shape has one letter in all problems, which can be learned by heart"
    problems.add_argument("--own-letters", action="store_true", help=help_letters)
    tokenizer = _add(commands, "tokenizer", _tokenizer, "train a byte-level BPE tokenizer on all texts")
    tokenizer.add_argument("roots", nargs="+", metavar="ROOT")
    tokenizer.add_argument("--out", required=True, metavar="DIR", help="folder that transformers' AutoTokenizer loads")
    tokenizer.add_argument("--vocab-size", type=int, default=512, help="tokens at most (%(default)s)")
    help_text = "a further text to learn from, such as the words of another template than v1 (may be repeated)"
    tokenizer.add_argument("--text", action="append", default=[], metavar="TEXT", help=help_text)

    args, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in args.parser._actions for option in action.option_strings]
        raise ConfigError(f"unknown argument '{unknown[0]}'.{nearest(unknown[0], options)}")
    return args


def _add_build(commands) -> None:
    build = commands.add_parser("build", help="convert a foreign format, or draw shapes, into shards")
    sources = build.add_subparsers(title="sources", required=True, metavar="SOURCE")

    shapes = _add(sources, "shapes", _build, "drawn scenes with captions, boxes, questions and dialogues")
    shapes.add_argument("--min-objects", type=int, default=1, help="(%(default)s)")
    shapes.add_argument("--max-objects", type=int, default=3, help="(%(default)s)")
    shapes.set_defaults(convert=_shapes)

    summary = "drawn scenes of one object with dialogues of LLaVA's three response types"
    instructions = _add(sources, "instructions", _build, summary)
    types = ("conversation", "detail_description", "complex_reasoning")
    help_types = f"response types, in turn ({' '.join(types)})"
    instructions.add_argument("--types", nargs="+", default=types, metavar="TYPE", help=help_types)
    instructions.set_defaults(convert=_instructions)

    for source in (shapes, instructions):
        source.add_argument("--count", type=int, default=2000, help="samples (%(default)s)")
        source.add_argument("--split", default="train", help="a word that makes another stream (%(default)s)")
        source.add_argument("--seed", type=int, default=0, help="(%(default)s)")
        source.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (%(default)s)")
        _add_kinds(source)

    easy_vqa = _add(sources, "easy_vqa", _build, "the easy-VQA data set")
    easy_vqa.add_argument("data", help="folder that holds easy_vqa/data")
    easy_vqa.add_argument("--split", default="train", choices=("train", "val", "test"), help="(%(default)s)")
    easy_vqa.add_argument("--held-out", type=int, default=0, metavar="N", help="every Nth train picture makes up val")
    easy_vqa.set_defaults(convert=_easy_vqa)

    llava = _add(sources, "llava_json", _build, "LLaVA's JSON list of conversations and its pictures")
    llava.add_argument("json", help="such as llava_instruct_150k.json")
    llava.add_argument("images", help="folder that the entries' pictures are in")
    llava.add_argument("--type", help="response type of entries that name none, such as conversation")
    llava.set_defaults(convert=_llava_json)

    coco = _add(sources, "coco", _build, "pictures with COCO's captions and boxes")
    coco.add_argument("images", help="picture folder")
    coco.add_argument("--captions", metavar="JSON", help="such as captions_train2017.json")
    coco.add_argument("--instances", metavar="JSON", help="such as instances_train2017.json")
    coco.add_argument("--table", metavar="JSONL", help="captions and boxes of one picture a line, in place of both")
    coco.set_defaults(convert=_coco)

    scienceqa = _add(sources, "scienceqa", _build, "ScienceQA in its official layout, in LLaVA's single-turn form")
    scienceqa.add_argument("data", help="folder of problems.json, pid_splits.json and, where there are, images/<split>")
    scienceqa.add_argument("--split", default="train", help="train, val, test, minival, … (%(default)s)")
    forms = ("QCM-LEA", "QCM-ALE")
    scienceqa.add_argument("--form", default=forms[0], choices=forms, help="reasoning first, or answer first: QCM-ALE")
    scienceqa.add_argument("--captions", metavar="JSON", help="captions of the pictures, to stand in the context")
    scienceqa.set_defaults(convert=_scienceqa)
    # A problem whose picture is missing is kept as text.
    _add_budget(scienceqa, 1.0)

    captions = _add(sources, "captions", _build, "pictures with captions in .txt beside them, or in a table")
    captions.add_argument("images", help="picture folder")
    captions.add_argument(
        "--captions", metavar="TABLE", help=".csv, .tsv or .jsonl; without it x.txt lies beside x.jpg"
    )
    captions.add_argument("--caption-field", help="the table's column of captions")
    captions.set_defaults(convert=_captions)

    images = _add(sources, "images", _build, "pictures with classes: a sub-folder for each class, or a table")
    images.add_argument("images", help="picture folder")
    images.add_argument("--labels", metavar="TABLE", help=".csv, .tsv or .jsonl; without it sub-folders are classes")
    images.add_argument("--maps", metavar="DIR", help="a PNG of the same path for each picture, such as a segmentation")
    images.set_defaults(convert=_images)

    for source in (captions, images):
        source.add_argument("--image-field", help="the table's column of picture paths")
        source.add_argument("--class-field", help="the table's column of classes")
    for source in (llava, coco, captions, images):
        _add_budget(source)
    for source in (shapes, instructions, easy_vqa, llava, coco, scienceqa, captions, images):
        _add_destination(source)


def _add_encode(commands) -> None:
    summary = "encode pictures with a trained first stage: a cache of its latents or codes"
    encode = _add(commands, "encode", _build, summary)
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
    encode.add_argument("--batch-size", type=_positive, default=64, help="pictures at a time (%(default)s)")
    encode.set_defaults(convert=_encoded)
    _add_budget(encode)
    _add_destination(encode)


def _add_kinds(parser: argparse.ArgumentParser) -> None:
    kinds = ("circle", "square", "triangle", "diamond", "star", "cross")
    parser.add_argument("--kinds", nargs="+", default=kinds, metavar="SHAPE", help=f"({' '.join(kinds)})")


def _add_budget(parser: argparse.ArgumentParser, share: float = 0.0) -> None:
    help_budget = "share of pictures that may be missing (%(default)s)"
    parser.add_argument("--missing-budget", type=float, default=share, metavar="SHARE", help=help_budget)


def _add_destination(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--shard-samples", type=int, default=1000, help="samples per shard (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier set of shards")


def _add(commands, name: str, run, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=run, parser=parser)
    return parser


def _positive(text: str) -> int:
    """The type of an option that counts something: 1, 2, …"""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be a whole number of at least 1, not {text}")
    return int(text)


def _existing(path: str) -> str:
    """Return the path of something that exists, or raise ConfigError with the nearest name beside it."""
    place = Path(path).expanduser()
    if ":" in path or place.exists():  # a URL or a command is refused where folders are opened
        return path
    siblings = [str(other) for other in place.parent.iterdir()] if place.parent.is_dir() else []
    raise ConfigError(f"there is no {path}.{nearest(str(place), siblings)}")


if __name__ == "__main__":
    sys.exit(main())
