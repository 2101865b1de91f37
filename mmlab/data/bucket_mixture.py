"""Sources of images in aspect buckets: which images each bucket has, and which bucket each global batch is of.

Each global batch is of one bucket, on all ranks and in all micro-batches. Buckets take turns in exact shares, as the
sources of a mixture do; in each bucket, the sources do. So a position is found without a table of the epoch, for any
ranks, and memory grows with shards and buckets, not with samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from math import lcm

from mmlab.data.aspects import Shape, shape_name
from mmlab.data.mixture import Mixture, Source, integers
from mmlab.data.set_buckets import Bucket, SetBuckets


def by_bucket(sources: Sequence[Source], shapes: tuple[Shape, ...]) -> list[Source]:
    """Split sources by bucket: all parts of the first bucket, then those of the second one, and so on.

    A part keeps its source's name and weight. Parts of one source go through its shards in the same order.
    """
    wholes = [SetBuckets.of(source.index, shapes) for source in sources]
    parts = [
        replace(source, bucket=Bucket(whole, number))
        for number in range(len(shapes))
        for source, whole in zip(sources, wholes, strict=True)
    ]
    return [part for part in parts if len(part)]


def bucket_sizes(parts: Sequence[Source]) -> dict[Shape, int]:
    """Images of each bucket over all sources, of what `by_bucket` returns."""
    return {shape: sum(map(len, group)) for shape, group in _grouped(parts)}


def small_buckets(parts: Sequence[Source], global_batch: int) -> str | None:
    """A sentence about buckets that have too few images for a batch of different ones; None without any."""
    sizes = bucket_sizes(parts)
    small = {shape: size for shape, size in sizes.items() if size < global_batch}
    if not small:
        return None
    listed = ", ".join(f"{shape_name(shape)} ({size})" for shape, size in small.items())
    return (
        f"{len(small)} of {len(sizes)} buckets have fewer images than data.global_batch={global_batch}, so a batch of "
        f"them shows images several times: {listed}; lower data.buckets.max_aspect, or raise data.buckets.step."
    )


class BucketMixture:
    """An endless stream over the buckets of several sources, one bucket in each global batch.

    Buckets are drawn in proportion to their images, weighted by the sources' weights; a bucket's share is exact to
    within `depth / 2` batches (see `Mixture`). No image is shown again before all images of its source in its bucket.

    Args:
        parts: of `by_bucket`; either all have a weight or none.
        global_batch: samples of a batch.
    """

    def __init__(self, parts: Sequence[Source], global_batch: int):
        self.global_batch = global_batch
        names = list(dict.fromkeys(part.name for part in parts))
        sizes = {name: sum(len(part) for part in parts if part.name == name) for name in names}
        weights = {part.name: sizes[part.name] if part.weight is None else part.weight for part in parts}
        shares = dict(zip(names, integers([weights[name] for name in names]), strict=True))
        # Whole numbers, so that a third is exactly a third for any sizes.
        scale = lcm(*sizes.values())
        self.first: list[int] = []  # the first part of each bucket
        self.within: list[Mixture] = []
        for _, group in _grouped(parts):
            self.first.append(sum(len(mixture.sizes) for mixture in self.within))
            weighted = [shares[part.name] * len(part) * (scale // sizes[part.name]) for part in group]
            self.within.append(Mixture(list(map(len, group)), weighted))
        self.batches = Mixture([sum(each.sizes) for each in self.within], [sum(each.weights) for each in self.within])

    def at(self, position: int) -> tuple[int, int]:
        """Return (part, cursor), as `Mixture.at` does."""
        step, place = divmod(position, self.global_batch)
        bucket, turn = self.batches.at(step)
        part, cursor = self.within[bucket].at(turn * self.global_batch + place)
        return self.first[bucket] + part, cursor

    def served(self, position: int) -> list[int]:
        """Return how often each part has served before a position."""
        step, place = divmod(position, self.global_batch)
        counts = [turns * self.global_batch for turns in self.batches.served(step)]
        counts[self.batches.at(step)[0]] += place
        return [n for mixture, count in zip(self.within, counts, strict=True) for n in mixture.served(count)]


def _grouped(parts: Sequence[Source]) -> Iterator[tuple[Shape, list[Source]]]:
    """The parts of each bucket."""
    for shape, group in groupby(parts, lambda part: part.bucket.shape):  # type: ignore[union-attr]
        yield shape, list(group)
