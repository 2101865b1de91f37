"""Synthetic scenes as shards with a tokenizer, as written by `mmlab shards`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlab.data.formats import Members
from mmlab.data.index import ShardIndex
from mmlab.data.shard_files import ShardWriter, write_shards
from mmlab.data.sources.shapes import shapes
from mmlab.data.tokenizer import train_tokenizer


def make_shapes(root: Path, train: int = 12, val: int = 4, size: int = 16) -> Path:
    """Write `train/`, `val/` and `tokenizer/` into `root`; samples have captions, questions and dialogues."""
    indexes = [
        write_shards(shapes(count, split, size=size), root / split, 6, quiet=True)[0]
        for split, count in (("train", train), ("val", val))
    ]
    train_tokenizer(indexes, root / "tokenizer", 300, quiet=True)
    return root


def make_records(root: Path, records: Sequence[dict[str, Any]], pictures: Sequence[bytes | None]) -> ShardIndex:
    """Write records as samples `s0000`, …, each with its PNG or as text only."""
    with ShardWriter(root, 8, quiet=True) as writer:
        for i, (record, picture) in enumerate(zip(records, pictures, strict=True)):
            members: Members = {"json": record}
            writer.write(f"s{i:04d}", members | {"png": picture} if picture else members)
    return writer.index
