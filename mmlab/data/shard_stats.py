"""What a set of shards holds, summarized from its index."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np

from mmlab.data.anyres import tiles_and_places
from mmlab.data.aspects import Shape, bucket_of, cropped, shape_name
from mmlab.data.formats import EXTENSIONS, PIXEL_CAP, SIDE_CAP
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec

_TOTALS = ("members", "pictures", "pictures_unreadable", "pictures_beyond_cap", "samples_without_text", "buckets")
_SPREADS = ("pictures_per_sample", "width", "height", "tiles", "image_tokens", "cropped", "text_characters")
_PARTS = 64  # counts of so many shards are joined at a time


def stats(index: ShardIndex, spec: ImageSpec | None = None, shards: Sequence[int] | None = None) -> dict[str, Any]:
    """Summarize a set of shards from its index, as plain JSON data.

    Args:
        index: open shards.
        spec: of a vision-language model, whose tiles and tokens per picture are counted, or of an image model with
            aspect buckets, whose pictures are counted, with the mean share of their area that they cut off.
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
        for name in filter(summary.__contains__, _TOTALS):
            summary[name] = _scaled(summary[name], scale)
        summary["estimated"] = [name for name in summary if name in _TOTALS + _SPREADS]
    return summary


def _contents(index: ShardIndex, spec: ImageSpec | None, shards: Sequence[int]) -> dict[str, Any]:
    """What the tables of some shards state."""
    members = np.zeros(len(EXTENSIONS), np.int64)
    pictures, lengths, sizes, first = _Counts(), _Counts(), _Counts(), _Counts()
    for table in index.tables(shards):
        members += np.bincount(table.extension, minlength=len(EXTENSIONS))
        pictures.add(table.pictures)
        lengths.add(table.text_lengths)
        for some, counts in ((table.image_sizes, (sizes, first)), (table.further_sizes, (sizes,))):
            for each in counts:
                each.add(some[some[:, 0] > 0].astype(np.int64) @ (1 << 32, 1))
    width, height = _sides(sizes)
    count = int((pictures.values * pictures.counts).sum())
    return {
        "members": {name: int(count) for name, count in zip(EXTENSIONS, members, strict=True) if count},
        "pictures": count,
        "pictures_per_sample": _spread(pictures.values, pictures.counts),
        "pictures_unreadable": count - int(sizes.counts.sum()),
        "pictures_beyond_cap": int(sizes.counts[width * height > PIXEL_CAP].sum()),
        "width": _spread(width, sizes.counts),
        "height": _spread(height, sizes.counts),
        **({} if spec is None or spec.buckets else _model_view(width, height, sizes.counts, spec)),
        **({} if spec is None or not spec.buckets else _bucket_view(*_sides(first), first.counts, spec.buckets)),
        "text_characters": _spread(lengths.values, lengths.counts),
        "samples_without_text": int(lengths.counts[lengths.values == 0].sum()),
    }


class _Counts:
    """How often each value occurs, gathered shard by shard: its memory grows with the different values."""

    def __init__(self):
        self._parts: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]

    def add(self, values: np.ndarray) -> None:
        self._parts.append(np.unique(values.astype(np.int64), return_counts=True))
        if len(self._parts) == _PARTS:
            self._joined()

    @property
    def values(self) -> np.ndarray:
        """int64, ascending."""
        return self._joined()[0]

    @property
    def counts(self) -> np.ndarray:
        """int64, of each value."""
        return self._joined()[1]

    def _joined(self) -> tuple[np.ndarray, np.ndarray]:
        if len(self._parts) != 1:
            values, counts = (np.concatenate(part) for part in zip(*self._parts, strict=True))
            values, places = np.unique(values, return_inverse=True)
            joined = np.zeros(len(values), np.int64)
            np.add.at(joined, places, counts)
            self._parts = [(values, joined)]
        return self._parts[0]


def _model_view(width: np.ndarray, height: np.ndarray, counts: np.ndarray, spec: ImageSpec) -> dict[str, Any]:
    """What pictures take in a model: tiles, and places in the sequence."""
    pairs = zip(width.tolist(), height.tolist(), strict=True)
    each = np.array([tiles_and_places(*pair, spec) for pair in pairs], np.int64).reshape(-1, 2)
    return {name: _spread(each[:, n], counts, 95) for n, name in enumerate(("tiles", "image_tokens"))}


def _sides(sizes: _Counts) -> tuple[np.ndarray, np.ndarray]:
    """Width and height of each size."""
    return sizes.values >> 32, sizes.values & 0xFFFF_FFFF


def _bucket_view(width: np.ndarray, height: np.ndarray, counts: np.ndarray, shapes: Sequence[Shape]) -> dict[str, Any]:
    """The pictures of each aspect bucket, and the mean share of their area that it cuts off."""
    numbers = bucket_of(width.clip(max=SIDE_CAP), height.clip(max=SIDE_CAP), shapes)
    totals, cut = np.zeros(len(shapes), np.int64), np.zeros(len(shapes))
    rows = zip(width.tolist(), height.tolist(), counts.tolist(), numbers.tolist(), strict=True)
    for across, down, count, number in rows:
        totals[number] += count
        cut[number] += count * cropped(across, down, shapes[number])
    there = [(shape_name(shape), int(n), cut[b]) for b, (shape, n) in enumerate(zip(shapes, totals, strict=True)) if n]
    return {
        "buckets": {name: n for name, n, _ in there},
        "cropped": {name: round(float(share) / n, 4) for name, n, share in there},
    }


def _type_counts(index: ShardIndex) -> dict[str, int] | None:
    if index.type_names == ("",):
        return None
    types = [entry.types or {} for entry in index.manifest.entries]
    return {name or "none": sum(one.get(name, 0) for one in types) for name in index.type_names}


def _scaled(value: Any, scale: float) -> Any:
    if isinstance(value, dict):
        return {name: _scaled(one, scale) for name, one in value.items()}
    return round(value * scale)


def _spread(values: np.ndarray, counts: np.ndarray | None = None, percentile: int | None = None) -> Any:
    """Smallest, middle and largest value, and a percentile, of values that occur `counts` times, or once."""
    if not len(values):
        return None
    order = np.argsort(values, kind="stable")
    values, ends = values[order], np.cumsum(np.ones_like(order) if counts is None else counts[order])

    def at(percent: float) -> float:
        """The linear interpolation of numpy.percentile."""
        place = (int(ends[-1]) - 1) * percent / 100
        low, high = (int(values[np.searchsorted(ends, n, side="right")]) for n in (int(place), ceil(place)))
        return low + (high - low) * (place - int(place))

    high = {} if percentile is None else {f"{percentile} %": at(percentile)}
    return {"min": int(values[0]), "median": at(50), **high, "max": int(values[-1])}
