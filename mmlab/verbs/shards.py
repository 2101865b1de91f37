"""`mmlab shards`: make, check and inspect the shards that training reads."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mmlab.config.errors import ConfigError, UserError, nearest
from mmlab.verbs._shard_arguments import Parser, add, existing, part_of, positive
from mmlab.verbs._shard_build import add_build, add_drawing
from mmlab.verbs._shard_checks import add_checks
from mmlab.verbs._shard_encode import add_encode

# torch, Pillow and transformers are imported by the commands that need them, so that `--help` is fast.


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mmlab shards …` and return the exit code: 0, 1 for broken data, 2 for a wrong command line."""
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
    from mmlab.data.index import OLD_INDEX
    from mmlab.data.indexing import index_part, index_set

    if args.part is not None:
        count, read = index_part(args.root, args.part, args.require, args.workers, again=args.again)
        part, same = "{} of {}".format(*args.part), _command(args)
        print(f"{args.root}: {count} shards are in part {part}, {read} of them were read; after all parts, run {same}")
        return
    done = index_set(args.root, args.require, args.workers, again=args.again)
    if done.replaced:
        print(f"{done.root} had an index of an earlier version, {OLD_INDEX}; it is replaced")
    count, samples, notes = len(done.manifest.entries), int(done.manifest.samples.sum()), done.manifest.notes.lines()
    rest = "" if done.read == count else f", {count - done.read} of them unchanged"
    print(f"{done.root}: {samples} samples in {count} shards, all intact{rest}; index {done.manifest.hash[:12]}")
    print(*notes, sep="\n", end="\n" * bool(notes))


def _command(args: argparse.Namespace) -> str:
    """The command that joins what parts have indexed."""
    words = ["mmlab", "shards", "index", args.root, *(word for name in args.require for word in ("--require", name))]
    return f"`{shlex.join(words)}`"


def _problems(args: argparse.Namespace) -> None:
    from mmlab.data.sources.drawn_problems import write_problems

    counts = {split: getattr(args, split) for split in ("train", "val", "test")}
    counts = write_problems(args.out, counts, args.seed, args.size, args.kinds, args.own_letters)
    print(f"{args.out}: {counts['problems']} problems, {counts['pictures']} of them about an image")


def _tokenizer(args: argparse.Namespace) -> None:
    from mmlab.data.bad_samples import BadSamples
    from mmlab.data.index import ShardIndex
    from mmlab.data.tokenizer import train_tokenizer
    from mmlab.runs.disk import no_file

    no_file(Path(args.out))
    indexes = [ShardIndex.open(root) for root in args.roots]
    bad = [BadSamples(index.root, len(index)) for index in indexes]
    tokenizer = train_tokenizer(indexes, args.out, args.vocab_size, args.text, bad=bad)
    read = sum(map(len, indexes)) - sum(map(len, bad))
    print(f"{args.out}: {len(tokenizer)} tokens from {read} samples")
    for left_out in filter(len, bad):
        print(f"{left_out.root}: {left_out}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="mmlab shards", description="Make, check and inspect the shards that training reads.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_build(commands)
    add_encode(commands)
    index = add(commands, "index", _index, "verify foreign or changed tars and write the index beside them")
    help_root = "folder or address (s3://…) of .tar files; other files in it are ignored"
    index.add_argument("root", type=existing, help=help_root)
    help_require = "a member that each sample must have, such as json or 'jpg|png' (may be repeated)"
    index.add_argument("--require", action="append", default=[], metavar="EXT", help=help_require)
    help_part = "read only one part of the shards, for jobs in parallel; then the same command without it joins them"
    index.add_argument("--part", type=part_of, metavar="K/N", help=help_part)
    index.add_argument("--again", action="store_true", help="read shards again that have not changed")
    index.add_argument("--workers", type=positive, default=1, help="processes that read in parallel (%(default)s)")
    add_checks(commands)
    problems = add(
        commands, "problems", _problems, "write synthetic problems in ScienceQA's layout, about drawn scenes"
    )
    problems.add_argument("out", help="folder to create")
    for split, count in (("train", 2000), ("val", 200), ("test", 400)):
        problems.add_argument(f"--{split}", type=int, default=count, metavar="N", help="problems (%(default)s)")
    add_drawing(problems.add_argument)
    help_letters = "each color and each shape has the same letter in all problems, so that it can be memorized"
    problems.add_argument("--own-letters", action="store_true", help=help_letters)
    tokenizer = add(commands, "tokenizer", _tokenizer, "train a byte-level BPE tokenizer on all texts")
    tokenizer.add_argument("roots", nargs="+", metavar="ROOT", type=existing)
    tokenizer.add_argument("--out", required=True, metavar="DIR", help="folder for transformers' AutoTokenizer")
    tokenizer.add_argument("--vocab-size", type=int, default=512, help="largest number of tokens (%(default)s)")
    help_text = "an additional text to train on, such as the words of another template than v1 (may be repeated)"
    tokenizer.add_argument("--text", action="append", default=[], metavar="TEXT", help=help_text)

    args, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in args.parser._actions for option in action.option_strings]
        raise ConfigError(f"unknown argument '{unknown[0]}'.{nearest(unknown[0], options)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
