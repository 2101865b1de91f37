"""`mmlab shards verify`, `stats` and `show`: what looks at shards, all of them or a few."""

import argparse
import secrets
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError
from mmlab.config.locations import is_url
from mmlab.runs.disk import to_json
from mmlab.verbs._shard_arguments import add, existing, positive

STATS_SHARDS = 32
"""Shards whose tables `stats` reads by default, if a set is remote or has more than `STATS_SAMPLES`."""
STATS_SAMPLES = 1_000_000
VERIFIED_SHARDS = 8
"""Shards of a remote set that `verify` fetches by default."""


def add_checks(commands) -> None:
    """Add `verify`, `stats` and `show`."""
    verify = add(commands, "verify", _verify, "read every byte again and compare it with the index")
    verify.add_argument("root", type=existing, help="folder or address of a set of shards")
    help_workers = "processes that read in parallel (%(default)s)"
    verify.add_argument("--workers", type=positive, default=1, help=help_workers)
    _add_choice(verify, f"all of a folder, {VERIFIED_SHARDS} of an address", "a new one each time")
    stats = add(commands, "stats", _stats, "sizes, members, images and text lengths")
    stats.add_argument("root", type=existing, help="folder or address of a set of shards")
    help_recipe = "a recipe and changes to it, to count the tokens of its pictures, or its data.buckets: experiment=…"
    stats.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=help_recipe)
    stats.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    _add_choice(stats, f"{STATS_SHARDS} of an address or of more than {STATS_SAMPLES:,} samples, else all", "0")
    show = add(commands, "show", _show, "draw a contact sheet, or show samples as a recipe would train on them")
    show.add_argument("root", type=existing, help="folder or address of a set of shards")
    help_overrides = "a recipe and changes to it, as for mmlab train: experiment=llava/finetune_tiny data.max_length=64"
    show.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=help_overrides)
    help_key = "the sample to show as the recipe trains on it; the tables of all shards are searched"
    show.add_argument("--key", help=help_key)
    show.add_argument("--out", default="samples.png", metavar="PNG", help="file to write (%(default)s)")
    help_number = "samples, evenly spaced (16 of a contact sheet, 1 with a recipe); of an address, from few shards"
    show.add_argument("-n", dest="number", type=positive, help=help_number)
    show.add_argument("--columns", type=positive, default=4, help="(%(default)s)")


def _add_choice(parser: argparse.ArgumentParser, default: str, seed: str) -> None:
    """Add the arguments that choose shards."""
    group = parser.add_mutually_exclusive_group()
    help_shards = f"read so many shards, drawn from equal parts of the set ({default})"
    group.add_argument("--shards", type=positive, metavar="N", help=help_shards)
    group.add_argument("--all", action="store_true", help="read all shards")
    parser.add_argument("--seed", type=int, help=f"of the draw ({seed})")


def _verify(args: argparse.Namespace) -> None:
    from mmlab.data.index import ShardIndex
    from mmlab.data.subsets import drawn
    from mmlab.data.verification import verify

    index, seed = ShardIndex.open(args.root), secrets.randbelow(1 << 31) if args.seed is None else args.seed
    total = len(index.shards)
    count = total if args.all else args.shards or (VERIFIED_SHARDS if is_url(index.root) else total)
    chosen = drawn(total, count, seed)
    verify(index, chosen, args.workers)
    size = f"{index.shard_sizes[list(chosen)].sum() / 1e6:.1f} MB as indexed"
    if len(chosen) == total:
        print(f"{index.root}: {len(index)} samples in {total} shards, all {size}")
        return
    samples = int(index.samples_per_shard[list(chosen)].sum())
    print(f"{index.root}: {samples:,} of {len(index):,} samples in {len(chosen):,} of {total:,} shards, {size}")
    print(f"the other shards were not read; --all reads them, --seed {seed} reads these again")


def _stats(args: argparse.Namespace) -> None:
    from mmlab.data.index import ShardIndex
    from mmlab.data.progress_bar import progress
    from mmlab.data.shard_stats import stats
    from mmlab.data.subsets import drawn

    index, spec, seed = ShardIndex.open(args.root), None, args.seed or 0
    if args.overrides:
        from mmlab.verbs._shard_samples import spec_of

        spec = spec_of(args.overrides)
    total = len(index.shards)
    large = is_url(index.root) or len(index) > STATS_SAMPLES
    chosen = drawn(total, total if args.all else args.shards or (STATS_SHARDS if large else total), seed)
    if is_url(index.root):
        for shard in progress(chosen, "fetching tables", len(chosen)):
            index.table(shard)
    summary = stats(index, spec, chosen)
    estimated = summary["estimated"]
    if estimated:
        summary["seed"] = seed
    if args.json:
        print(to_json(summary))
        return
    for name, value in summary.items():
        if name in ("shards_read", "estimated", "seed"):
            continue
        print(f"{name.replace('_', ' '):<22} {'~ ' if name in estimated else ''}{_text(value)}")
    if estimated:
        read = f"{len(chosen):,} of {total:,} shards (--seed {seed})"
        print(f"~ is estimated from {read}; min and max are those of the samples read; --all reads all shards")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {_text(number)}" for key, number in value.items())
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _show(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.suffix != ".png" or not out.parent.is_dir():
        raise ConfigError(f"--out must be a .png in an existing folder, not {out}.")
    if args.overrides:
        from mmlab.verbs._shard_samples import show_samples

        show_samples(args.root, args.overrides, args.key, args.number or 1, out)
        return
    if args.key is not None:
        raise ConfigError("--key shows a sample as a recipe trains on it; name one: experiment=llava/finetune_tiny.")
    from mmlab.data.index import ShardIndex
    from mmlab.data.subsets import shown
    from mmlab.report.shard_sheet import sample_sheet
    from mmlab.runs.disk import replacing

    index, number = ShardIndex.open(args.root), args.number or 16
    with replacing(out) as draft:
        sample_sheet(index, number, args.columns).save(draft)
    print(f"{out}: {len(shown(index, number))} of {len(index)} samples of {index.root}")
