"""`mmlab shards`: make, check and look at the shards that training reads."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mmlab.config.errors import ConfigError, UserError, nearest
from mmlab.verbs._shard_build import Parser, add, add_build, add_encode, add_kinds, existing, positive

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


def _index(args: argparse.Namespace) -> None:
    from mmlab.data.index import build_index

    index = build_index(existing(args.root), args.require, args.workers)
    print(f"{index.root}: {len(index)} samples in {len(index.shards)} shards are whole; index {index.hash[:12]}")


def _verify(args: argparse.Namespace) -> None:
    from mmlab.data.shards import verify

    index = verify(existing(args.root), args.workers)
    size = index.shard_sizes.sum() / 1e6
    print(f"{index.root}: {len(index)} samples in {len(index.shards)} shards, all {size:.1f} MB as indexed")


def _stats(args: argparse.Namespace) -> None:
    from mmlab.data.index import ShardIndex
    from mmlab.data.shards import stats

    summary = stats(ShardIndex.open(existing(args.root)))
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
    index = ShardIndex.open(existing(args.root))
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

    indexes = [ShardIndex.open(existing(root)) for root in args.roots]
    tokenizer = train_tokenizer(indexes, args.out, args.vocab_size, args.text)
    print(f"{args.out}: {len(tokenizer)} tokens from {sum(map(len, indexes))} samples")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="mmlab shards", description="Make, check and look at the shards that training reads.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_build(commands)
    add_encode(commands)
    index = add(commands, "index", _index, "verify foreign or changed tars and write the index beside them")
    index.add_argument("root", help="folder of .tar files; others in it are left alone")
    help_require = "a member that each sample must have, such as json or 'jpg|png' (may be repeated)"
    index.add_argument("--require", action="append", default=[], metavar="EXT", help=help_require)
    verify = add(commands, "verify", _verify, "read every byte again and compare it with the index")
    verify.add_argument("root")
    for command in (index, verify):
        command.add_argument("--workers", type=int, default=1, help="processes that read side by side (%(default)s)")
    stats = add(commands, "stats", _stats, "sizes, members, pictures and text lengths")
    stats.add_argument("root")
    stats.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    show = add(commands, "show", _show, "a contact sheet of samples with their texts")
    show.add_argument("root")
    show.add_argument("--out", default="samples.png", metavar="PNG", help="where to (%(default)s)")
    help_number = "samples, spread over the set (%(default)s)"
    show.add_argument("-n", dest="number", type=positive, default=16, help=help_number)
    show.add_argument("--columns", type=positive, default=4, help="(%(default)s)")
    problems = add(commands, "problems", _problems, "write made problems in ScienceQA's layout, about drawn scenes")
    problems.add_argument("out", help="folder to make")
    for split, count in (("train", 2000), ("val", 200), ("test", 400)):
        problems.add_argument(f"--{split}", type=int, default=count, metavar="N", help="problems (%(default)s)")
    problems.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    problems.add_argument("--size", type=positive, default=64, help="side of the pictures in pixels (%(default)s)")
    add_kinds(problems)
    help_letters = "each color and each shape has one letter in all problems, which can be learned by heart"
    problems.add_argument("--own-letters", action="store_true", help=help_letters)
    tokenizer = add(commands, "tokenizer", _tokenizer, "train a byte-level BPE tokenizer on all texts")
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


if __name__ == "__main__":
    sys.exit(main())
