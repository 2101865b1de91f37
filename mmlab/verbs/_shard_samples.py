"""`mmlab shards show` with a recipe: samples as it would train on them."""

import os
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, nearest
from mmlab.config.locations import Url
from mmlab.runs.disk import to_json


def show_samples(root: str, overrides: Sequence[str], key: str | None, number: int, out: Path) -> None:
    """Print samples as a recipe trains on them, and draw them.

    Args:
        root: folder of shards.
        overrides: as for `mmlab train`, such as `experiment=llava/finetune_tiny`.
        key: of the sample; None: `number` of them, evenly spaced.
        number: samples.
        out: the picture to write.
    """
    from mmlab.config.compose import compose
    from mmlab.data.index import ShardIndex
    from mmlab.data.subsets import shown
    from mmlab.report.training_view import view_of, view_sheet
    from mmlab.runs.disk import replacing
    from mmlab.runs.terminal import print_styled

    index = ShardIndex.open(root)
    places = shown(index, number)
    if key is not None:
        place = find_key(index, key)
        if place is None:
            raise ConfigError(f"{root} has no sample '{key}'.{nearest(key, list(islice(index.keys, 10_000)))}")
        places = [place]
    cfg = compose("train", list(overrides))
    collate = _collate(cfg)
    views = [view_of(collate, _sample(index, i, collate, cfg.seed)) for i in places]
    recipe = next((text.partition("=")[2] for text in overrides if text.startswith("experiment=")), "this config")
    colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for view in views:
        _print_view(view, print_styled, colored)
    folder = index.root.resolve()
    with replacing(out) as draft:
        view_sheet(views, f"{folder.parent.name}/{folder.name} as {recipe} trains on it").save(draft, "PNG")
    print(f"{out}: {len(views)} of {len(index)} samples of {index.root}, as {recipe} trains on them")


def find_key(index: Any, key: str) -> int | None:
    """The place of a key, for which the tables of the shards are read in turn."""
    from mmlab.data.progress_bar import progress

    total = len(index.shards)
    if isinstance(index.root, Url):
        size = sum(entry.table_bytes for entry in index.manifest.entries) / 1e6
        text = f"'{key}' is searched in the tables of {total:,} shards ({size:,.1f} MB), which are fetched one by one"
        print(text, file=sys.stderr)
    return index.find(key, progress(range(total), "searching tables", total))


def spec_of(overrides: Sequence[str]) -> Any:
    """The `ImageSpec` of a vision-language recipe, or of an image recipe with aspect buckets.

    Raises:
        ConfigError: another recipe.
    """
    from mmlab.config.compose import compose

    spec = _collate(compose("train", list(overrides))).image
    if spec is None or not (spec.tokens or spec.buckets):
        raise ConfigError(
            "this recipe gives pictures neither tokens nor buckets to count; name a vision-language one, such as "
            "experiment=llava/finetune_tiny, or set data.buckets.max_aspect of an image recipe."
        )
    return spec


def _collate(cfg: Any) -> Any:
    """The collate of the recipe's stage around a model without weights."""
    import torch
    from omegaconf import OmegaConf

    from mmlab.config.build import build, check_targets
    from mmlab.runs.check import check_trainable

    check_trainable(cfg)
    check_targets(cfg)
    with torch.device("meta"):
        model = build(cfg.model)
    for name, part in model.named_modules():
        if getattr(part, "tokenizer", part) is None:
            key = f"model.{name}".rstrip(".")
            raise ConfigError(f"the tokenizer of {key} is not on this machine; set {key}.tokenizer to a folder.")
    parts = {name: build(cfg[name]) for name in ("process", "sampler") if cfg.get(name) is not None}
    stage = build(cfg.stage, model=model, optim=build(cfg.optim), **parts)
    data: Any = OmegaConf.to_object(cfg.data)
    return stage.collate(data)


def _sample(index: Any, i: int, collate: Any, seed: int) -> Any:
    """Sample `i` as the reader decodes it in the first epoch, at the place of its number."""
    from mmlab.data.bad_samples import sample_errors
    from mmlab.data.formats import parse_record
    from mmlab.data.images import decode_picture, pictures_read
    from mmlab.data.order import sample_seed
    from mmlab.data.sample_types import Sample, SampleError

    key, name = str(index.keys[i]), index.root.name
    try:
        with sample_errors():
            members = index.read(i)
            record = parse_record(members)
            spec = collate.image
            names = pictures_read(members, spec)
            pictures = [decode_picture(members[one], spec) for one in names] if spec is not None else []
    except SampleError as error:
        raise ConfigError(f"sample '{key}' of {index.root} cannot be read ({error.reason}): {error}") from None
    further = {one: members[one] for one in collate.members if one in members}
    return Sample(key, name, record, pictures, sample_seed(seed, 0, i, name), further, index.hash)


def _print_view(view: Any, print_styled: Any, colored: bool) -> None:
    from mmlab.report.training_view import CUT, MARKS, STYLES, SUPERVISED, shape_of

    shapes = [shape_of(picture) for picture in view.pictures]
    several = f"{len(shapes)} images: {'; '.join(shapes)}"
    print(f"sample {view.key} ({several if len(shapes) > 1 else f'image {shapes[0]}' if shapes else 'no image'})")
    for name, value in view.record.items():
        lines = value if isinstance(value, list) and all(isinstance(one, dict) for one in value) else [value]
        for number, line in enumerate(lines):
            print(f"  {name if number == 0 else '':<16}{to_json(line, ensure_ascii=False)}")
    if colored:
        print_styled([*((f" {state} ", STYLES[state]) for state in STYLES), ("\n", "")])
    else:
        print(f"{SUPERVISED}: {'…'.join(MARKS[SUPERVISED])}   {CUT}: {'…'.join(MARKS[CUT])}")
    for pieces in view.texts:
        if colored:
            print_styled([*((piece.text, STYLES[piece.state]) for piece in pieces), ("\n", "")])
        else:
            print("".join(MARKS[piece.state][0] + piece.text + MARKS[piece.state][1] for piece in pieces))
    if view.counts:
        print(", ".join(f"{name.replace('_', ' ')} {number}" for name, number in view.counts.items()))
    if view.error:
        print(view.error)
    print()
