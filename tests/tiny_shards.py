"""Small sets of shards and a collate that shows what it was given."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from mmlab.data.index import ShardIndex
from mmlab.data.sample import ImageSpec, Sample, SampleError
from mmlab.data.shards import ShardWriter


def make_shards(
    root: Path,
    samples: int,
    per_shard: int = 4,
    bad: Collection[int] = (),
    types: Sequence[str] = (),
    overwrite: bool = False,
) -> ShardIndex:
    """Text samples `<folder>0000`, …; those in `bad` are refused by `KeyCollate`, `types` come in turn."""
    with ShardWriter(root, per_shard, overwrite, quiet=True) as writer:
        for i in range(samples):
            kind = {"type": types[i % len(types)]} if types else {}
            writer.write(f"{root.name}{i:04d}", {"json": {"caption": f"number {i}", "bad": i in bad, **kind}})
    return writer.index


class KeyCollate:
    """Passes keys, sources and seeds through; picklable, so that spawned workers can have it."""

    members: tuple[str, ...] = ()

    def __init__(self, image: ImageSpec | None = None):
        self.image = image

    def prepare(self, sample: Sample) -> Sample:
        if sample.record.get("bad"):
            raise SampleError("no-loss", "nothing to learn")
        return sample

    def batch(self, prepared: list[Sample]) -> dict[str, Any]:
        stats: dict[str, dict[str, int]] = {}
        for sample in prepared:
            counts = stats.setdefault(sample.source, {"tokens": 0, "tokens_with_loss": 0})
            counts["tokens"] += 4
            counts["tokens_with_loss"] += 1
        return {
            "x": torch.tensor([[float(sample.seed % 97)] for sample in prepared]),
            "seeds": [sample.seed for sample in prepared],
            "sources": [sample.source for sample in prepared],
            "stats": stats,
        }
