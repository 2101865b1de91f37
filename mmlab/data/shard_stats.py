"""What a set of shards holds, summarized from its index."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmlab.data.anyres import tiles_and_places
from mmlab.data.formats import EXTENSIONS, PIXEL_CAP
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec

_TOTALS = ("members", "pictures", "pictures_unreadable", "pictures_beyond_cap", "samples_without_text")
_SPREADS = ("pictures_per_sample", "width", "height", "tiles", "image_tokens", "text_characters")


def stats(index: ShardIndex, spec: ImageSpec | None = None, shards: Sequence[int] | None = None) -> dict[str, Any]:
    """Summarize a set of shards from its index, as plain JSON data.

    Args:
        index: open shards.
        spec: of a vision-language model, whose tiles and tokens per picture are counted; None: of none.
        shards: numbers of those whose tables are read; None: all.

    Returns:
        What the manifest states is exact for any `shards`. `estimated` lists the other values, if not all tables were
        read: totals in proportion to the samples, and the spread over the samples that were read.
    """
    shards = range(len(index.shards)) if shards is None else shards
    read = int(index.samples_per_shard[list(shards)].sum())
    scale = len(index) / read if read else 0.0
    summary = {
        "root": str(index.root),
        "samples": len(index),
        "shards": len(index.shards),
        "bytes": int(index.shard_sizes.sum()),
        "samples_per_shard": _spread(index.samples_per_shard),
        **_contents(index, spec, shards),
        "records_unreadable": index.notes.bad_records,
        "members_not_read": index.notes.skipped or None,
        "types": _type_counts(index),
        "question_types": index.notes.question_types or None,
        "hash": index.hash,
        "shards_read": len(shards),
        "estimated": [],
    }
    if len(shards) < len(index.shards):
        for name in _TOTALS:
            summary[name] = _scaled(summary[name], scale)
        summary["estimated"] = [name for name in summary if name in _TOTALS + _SPREADS]
    return summary


def _contents(index: ShardIndex, spec: ImageSpec | None, shards: Sequence[int]) -> dict[str, Any]:
    """What the tables of some shards state."""
    members = np.bincount(index.joined("extension", shards), minlength=len(EXTENSIONS))
    pictures, lengths = index.joined("pictures", shards), index.joined("text_lengths", shards)
    sizes = np.concatenate([index.joined(name, shards) for name in ("image_sizes", "further_sizes")])
    sizes = sizes[sizes[:, 0] > 0]
    width, height = sizes.astype(np.int64).T
    count = int(pictures.sum())
    return {
        "members": {name: int(count) for name, count in zip(EXTENSIONS, members, strict=True) if count},
        "pictures": count,
        "pictures_per_sample": _spread(pictures),
        "pictures_unreadable": count - len(width),
        "pictures_beyond_cap": int((width * height > PIXEL_CAP).sum()),
        "width": _spread(width),
        "height": _spread(height),
        **({} if spec is None else _model_view(sizes, spec)),
        "text_characters": _spread(lengths),
        "samples_without_text": int((lengths == 0).sum()),
    }


def _model_view(sizes: np.ndarray, spec: ImageSpec) -> dict[str, Any]:
    """What pictures take in a model: tiles, and places in the sequence."""
    sizes, numbers = np.unique(sizes, axis=0, return_inverse=True)
    each = np.array([tiles_and_places(width, height, spec) for width, height in sizes.tolist()]).reshape(-1, 2)
    tiles, tokens = each[numbers.reshape(-1)].T
    return {"tiles": _spread(tiles, 95), "image_tokens": _spread(tokens, 95)}


def _type_counts(index: ShardIndex) -> dict[str, int] | None:
    if index.type_names == ("",):
        return None
    types = [entry.types or {} for entry in index.manifest.entries]
    return {name or "none": sum(one.get(name, 0) for one in types) for name in index.type_names}


def _scaled(value: Any, scale: float) -> Any:
    if isinstance(value, dict):
        return {name: _scaled(one, scale) for name, one in value.items()}
    return round(value * scale)


def _spread(values: np.ndarray, percentile: int | None = None) -> dict[str, float] | None:
    if not len(values):
        return None
    high = {} if percentile is None else {f"{percentile} %": float(np.percentile(values, percentile))}
    return {"min": int(values.min()), "median": float(np.median(values)), **high, "max": int(values.max())}
