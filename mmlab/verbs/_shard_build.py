"""`mmlab shards build`: shards of data in a foreign format, or drawn.

A foreign format is one function in `mmlab/data/sources`, which yields samples, and one `@source` here.
"""

import argparse
import importlib
import inspect
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError
from mmlab.data.formats import RESPONSE_TYPES
from mmlab.data.sources.scenes import KINDS, SIZES
from mmlab.runs.disk import to_json
from mmlab.verbs._shard_arguments import add, existing, file, folder, held_out, mapping, positive, share

QUESTIONS = ("color", "shape", "count", "position", "yesno")
Add = Callable[..., Any]
"""`ArgumentParser.add_argument`."""


def from_records_or_file(text: str) -> str:
    """The type of an argument that is `from-first-answer` or a file."""
    return text if text == "from-first-answer" else file(text)


def add_drawing(add: Add) -> None:
    """Add the arguments of everything that draws shapes."""
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--size", type=positive, default=64, help="side of the images in pixels (%(default)s)")
    add("--kinds", nargs="+", default=KINDS, metavar="SHAPE", help=f"({' '.join(KINDS)})")


def _add_samples(add: Add) -> None:
    add("--count", type=int, default=2000, help="samples (%(default)s)")
    add("--split", default="train", help="a word that selects another random stream (%(default)s)")
    add_drawing(add)


def _add_fields(add: Add) -> None:
    add("--image-field", help="the table's column of image paths")
    add("--class-field", help="the table's column of classes")
    add_budget(add)


def add_budget(add: Add, default: float = 0.0) -> None:
    """Add the share of images that may be left out."""
    help_budget = "share of images that may be missing or unsupported (%(default)s)"
    add("--missing-budget", type=share, default=default, metavar="SHARE", help=help_budget)


def _add_build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every source of rows."""
    add = parser.add_argument
    add("--limit", type=positive, metavar="N", help="read only the first N rows")
    help_workers = "threads that read and check images (the number of CPU cores)"
    add("--workers", type=positive, default=len(os.sched_getaffinity(0)), metavar="N", help=help_workers)
    if "--split" not in parser._option_string_actions:  # of the data set itself
        help_split = "hold out a share of the images, such as val=0.05; the rest is train (may be repeated)"
        add("--split", dest="splits", type=held_out, action="append", default=[], metavar="NAME=SHARE", help=help_split)
        add("--seed", type=int, default=0, help="another draw of the splits (%(default)s)")


def add_destination(add: Add) -> None:
    """Add where shards are written, and how."""
    add("out", help="folder to create, or the address of one: s3://bucket/mine")
    add("--shard-samples", type=int, default=1000, help="samples per shard (%(default)s)")
    add("--overwrite", action="store_true", help="replace an earlier set of shards")


DRAWN = ("shapes", "instructions")
"""Sources without rows to read."""
SOURCES: dict[str, tuple[str, str, Callable[[Add], None]]] = {}


def source(function: str, summary: str) -> Callable[[Callable[[Add], None]], None]:
    """Make the decorated function, which adds arguments, a source of `mmlab shards build`.

    Args:
        function: dotted name of the function that yields samples; its parameters have the names of the arguments.
        summary: for `--help`.
    """

    def register(arguments: Callable[[Add], None]) -> None:
        SOURCES[arguments.__name__.lstrip("_")] = function, summary, arguments

    return register


@source("mmlab.data.sources.shapes.shapes", "drawn scenes with captions, boxes, questions and dialogues")
def _shapes(add: Add) -> None:
    add("--min-objects", type=int, default=1, help="(%(default)s)")
    add("--max-objects", type=int, default=3, help="(%(default)s)")
    add("--types", nargs="+", default=QUESTIONS, metavar="TYPE", help=f"types of questions ({' '.join(QUESTIONS)})")
    help_single = "types that are asked only about scenes with a single object (none)"
    add("--single-types", nargs="+", default=(), metavar="TYPE", help=help_single)
    _add_samples(add)
    add("--sizes", nargs="+", default=SIZES, metavar="SIZE", help=f"of the objects ({' '.join(SIZES)})")


@source(
    "mmlab.data.sources.drawn_instructions.instructions",
    "drawn scenes of one object with dialogues of LLaVA's three response types",
)
def _instructions(add: Add) -> None:
    help_types = f"response types, in turn ({' '.join(RESPONSE_TYPES)})"
    add("--types", nargs="+", default=RESPONSE_TYPES, metavar="TYPE", help=help_types)
    _add_samples(add)


@source("mmlab.data.sources.easy_vqa.easy_vqa", "the easy-VQA data set")
def _easy_vqa(add: Add) -> None:
    add("root", metavar="data", type=folder, help="folder that contains easy_vqa/data")
    add("--split", default="train", choices=("train", "val", "test"), help="(%(default)s)")
    add("--held-out", type=int, default=0, metavar="N", help="every Nth train image belongs to val")


@source("mmlab.data.sources.llava_json.llava_json", "LLaVA's conversations (a JSON list or lines) and their images")
def _llava_json(add: Add) -> None:
    add("path", metavar="json", type=file, help="such as llava_instruct_150k.json")
    add("images", type=folder, help="folder of the entries' images")
    _add_chats(add)


@source("mmlab.data.sources.messages.messages", "chats in OpenAI's form: messages of text and image parts")
def _messages(add: Add) -> None:
    add("path", metavar="jsonl", type=file, help="JSON lines or a JSON list, as TRL and LLaMA-Factory read them")
    add("--images", type=folder, metavar="DIR", help="folder that the paths of images start from (the file's)")
    _add_chats(add)


@source("mmlab.data.sources.parquet.parquet", "parquet files of `datasets`: images with chats, captions or classes")
def _parquet(add: Add) -> None:
    add("path", metavar="parquet", type=existing, help="a file, or a folder with the files of one split")
    add("--files", default="*.parquet", metavar="GLOB", help="files of the folder, such as 'train-*' (%(default)s)")
    add("--images", type=folder, metavar="DIR", help="folder of images that rows name instead of holding them")
    add("--caption-field", help="the column of captions")
    add("--type", dest="kind", help="response type of rows without one")
    _add_fields(add)


def _add_chats(add: Add) -> None:
    add("--type", dest="kind", help="response type of records without one, such as conversation")
    help_captions = "take captions from the first answers of records that are captions, or from a table or JSON file"
    add("--captions", type=from_records_or_file, metavar="from-first-answer|FILE", help=help_captions)
    help_type = "a type of records that are captions, beside those named caption or description (may be repeated)"
    add("--caption-type", dest="caption_types", action="append", default=[], metavar="TYPE", help=help_type)
    add("--separate", action="store_true", help="make a sample of each record, with its own copy of the image")
    add_budget(add)


@source("mmlab.data.sources.coco.coco", "images with COCO's captions and boxes")
def _coco(add: Add) -> None:
    add("images", type=folder, help="image folder")
    add("--captions", type=file, metavar="JSON", help="such as captions_train2017.json")
    add("--instances", type=file, metavar="JSON", help="such as instances_train2017.json")
    add("--table", type=file, metavar="JSONL", help="captions and boxes of one image per line, instead of both")
    add_budget(add)


@source("mmlab.data.sources.boxes.voc", "images with boxes in Pascal VOC's XML files")
def _voc(add: Add) -> None:
    add("images", type=folder, help="image folder, such as JPEGImages")
    add("annotations", type=folder, help="folder of XML files, such as Annotations")
    help_list = "names of annotations to read, such as ImageSets/Main/train.txt"
    add("--list", dest="listed", type=file, metavar="TXT", help=help_list)
    add_budget(add)


@source("mmlab.data.sources.boxes.yolo", "images with boxes in YOLO's text files")
def _yolo(add: Add) -> None:
    add("images", type=folder, help="image folder, such as images/train")
    add("--names", type=file, required=True, metavar="FILE", help="data.yaml, or a text file with a class per line")
    add("--labels", type=folder, metavar="DIR", help="folder of text files (labels in place of images in the path)")
    add_budget(add)


@source("mmlab.data.sources.tars.tars", "tars of webdataset with other names of members, also compressed")
def _tars(add: Add) -> None:
    add("path", metavar="tars", type=existing, help="a tar, or a folder of tars, also at an address (s3://…)")
    help_members = "members that are the images, text, json or class: image=input.jpg,image0=next.jpg,text=output.txt"
    add("--members", type=mapping, metavar="NAME=MEMBER,…", help=help_members)


@source("mmlab.data.sources.scienceqa.scienceqa", "ScienceQA in its official layout, in LLaVA's single-turn form")
def _scienceqa(add: Add) -> None:
    help_root = "folder with problems.json, pid_splits.json and, if there are images, images/<split>"
    add("root", metavar="data", type=folder, help=help_root)
    add("--split", default="train", help="train, val, test, minival, … (%(default)s)")
    forms = ("QCM-LEA", "QCM-ALE")
    add("--form", default=forms[0], choices=forms, help="reasoning first, or answer first: QCM-ALE")
    add("--captions", type=file, metavar="JSON", help="captions of the images, for the context")
    add_budget(add, 1.0)  # a problem whose image is missing is kept as text


@source("mmlab.data.sources.captions.captions", "images with captions in .txt files next to them, or in a table")
def _captions(add: Add) -> None:
    add("images", type=folder, help="image folder")
    help_table = ".csv, .tsv, .json or .jsonl; without it, x.txt is the caption of x.jpg"
    add("--captions", dest="table", type=file, metavar="TABLE", help=help_table)
    add("--caption-field", help="the table's column of captions")
    _add_fields(add)


@source("mmlab.data.sources.image_folder.images", "images with classes: a subfolder per class, or a table")
def _images(add: Add) -> None:
    add("root", metavar="images", type=folder, help="image folder")
    help_labels = ".csv, .tsv, .json or .jsonl; without it, subfolders are classes"
    add("--labels", type=file, metavar="TABLE", help=help_labels)
    help_maps = "folder with a PNG of the same path for each image, such as a segmentation"
    add("--maps", type=folder, metavar="DIR", help=help_maps)
    _add_fields(add)


def add_build(commands) -> None:
    """Add `build` with a command for each source."""
    build = commands.add_parser("build", help="convert a foreign format, or draw shapes, into shards")
    sources = build.add_subparsers(title="sources", required=True, metavar="SOURCE")
    for name, (function, summary, arguments) in SOURCES.items():
        parser = add(sources, name, _build, summary)
        parser.set_defaults(function=function)
        arguments(parser.add_argument)
        if name not in DRAWN:
            _add_build(parser)
        add_destination(parser.add_argument)


def _build(args: argparse.Namespace) -> None:
    module, _, name = args.function.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    values = {parameter: getattr(args, parameter) for parameter in inspect.signature(function).parameters}
    if not hasattr(args, "workers"):
        write(args, function(**values), getattr(args, "count", None))
        return
    from mmlab.data.building import Build, write_rows

    start = time.monotonic()
    splits = getattr(args, "splits", [])
    if repeated := next((name for name, _ in splits if [one for one, _ in splits].count(name) > 1), None):
        raise ConfigError(f"--split gives '{repeated}' two shares.")
    fixed: dict[str, Any] = {"max_samples": args.shard_samples, "splits": dict(splits), "limit": args.limit}
    fixed["seed"] = getattr(args, "seed", 0)
    files = {value: _stamp(value) for value in values.values() if isinstance(value, str)}
    identity = to_json({"source": args.function, **values, **fixed, "files": files}, sort_keys=True)
    build = Build(**fixed, overwrite=args.overwrite, workers=args.workers, identity=identity)
    indexes, tally = write_rows(function(**values), args.out, build)
    _print_counts(list(indexes.values()), tally, time.monotonic() - start)


def _stamp(path: str) -> tuple[int, int] | None:
    """What changes with the contents of an input: its size and time."""
    place = Path(path).expanduser()
    return (place.stat().st_size, place.stat().st_mtime_ns) if os.path.exists(place) else None


def write(args: argparse.Namespace, samples: Any, total: int | None) -> None:
    """Write samples as shards to the destination, and print how many there are."""
    from mmlab.data.shard_files import write_shards

    start = time.monotonic()
    index, tally = write_shards(samples, args.out, args.shard_samples, args.overwrite, total=total)
    _print_counts([index], tally, time.monotonic() - start)


def _print_counts(indexes: list[Any], tally: Any, seconds: float) -> None:
    listed = "".join(f", {name.replace('_', ' ')} {count}" for name, count in tally.details.items())
    for index in indexes:
        rest = f", {seconds:.1f} s{listed}" if index is indexes[0] else ""
        print(f"{index.root}: {len(index)} samples in {len(index.shards)} shards{rest}")
    print(f"rows {tally.rows} = written {tally.written} + left out {tally.left_out.total()}")
    for line in tally.lines():
        print(f"left out: {line}")
