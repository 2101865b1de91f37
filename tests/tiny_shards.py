"""Small sets of shards, settings for them, and a collate that exposes the samples it receives."""

import tarfile
from collections.abc import Collection, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from mmlab.data.config import ShardsConfig, SourceConfig
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec, Prepared, Sample, SampleError
from mmlab.data.shard_files import ShardWriter


def make_shards(
    root: Path,
    samples: int,
    per_shard: int = 4,
    bad: Collection[int] = (),
    types: Sequence[str] = (),
    overwrite: bool = False,
) -> ShardIndex:
    """Text samples `<folder>0000`, …; those in `bad` are refused by `KeyCollate`; `types` are used in turn."""
    with ShardWriter(root, per_shard, overwrite, quiet=True) as writer:
        for i in range(samples):
            kind = {"type": types[i % len(types)]} if types else {}
            writer.write(f"{root.name}{i:04d}", {"json": {"caption": f"number {i}", "bad": i in bad, **kind}})
    return writer.index


def plain_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    """A tar with these members, which need not be a valid shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return path


def sources(*folders: Path) -> list[SourceConfig]:
    """One source per folder of shards."""
    return [SourceConfig(path=str(folder)) for folder in folders]


def settings(**options: Any) -> ShardsConfig:
    """Default settings for tests, with changes."""
    return ShardsConfig(**{"global_batch": 8, "micro_batch": 4, "seed": 0, **options})


class KeyCollate:
    """Passes keys, sources and seeds through; picklable for spawned workers."""

    members: tuple[str, ...] = ()

    def __init__(self, image: ImageSpec | None = None):
        self.image = image

    def prepare(self, sample: Sample) -> Prepared:
        if sample.record.get("bad"):
            raise SampleError("no-loss", "nothing to learn")
        return Prepared(sample, {"tokens": 4, "tokens_with_loss": 1})

    def batch(self, contents: list[Sample]) -> dict[str, Any]:
        return {
            "x": torch.tensor([[float(sample.seed % 97)] for sample in contents]),
            "seeds": [sample.seed for sample in contents],
            "sources": [sample.source for sample in contents],
        }
