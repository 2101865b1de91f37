"""A tiny set of shards."""

from mmlab.data.index import ShardIndex
from mmlab.data.shard_files import ShardWriter
from tests.tiny_files import png


def tiny_set(root, count=5, **options) -> ShardIndex:
    """Samples `s0`, `s1`, …, two in each shard; their pictures are 4, 5, … pixels wide, their captions 0, 1, … long."""
    with ShardWriter(root, max_samples=2, quiet=True, **options) as writer:
        for i in range(count):
            record = {"id": f"s{i}", "caption": "é" * i}
            writer.write(f"s{i}", {"png": png(4 + i), "json": record, "txt": "hi"})
    return writer.index
