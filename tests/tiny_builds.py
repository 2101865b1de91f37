"""Foreign data sets as shards, as `mmlab shards build` writes them."""

from pathlib import Path
from typing import Any

from mmlab.data.building import Build, Rows, write_rows
from mmlab.data.index import ShardIndex
from mmlab.data.tally import Tally


def built(rows: Rows, root: Path, **options: Any) -> tuple[ShardIndex, Tally]:
    """Write a data set without splits, in place of an earlier one; return the index and the counts."""
    indexes, tally = write_rows(rows, root, Build(overwrite=True, **options), quiet=True)
    return indexes["train"], tally
