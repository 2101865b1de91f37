"""Aspect buckets of remote shards equal those of the same shards on disk."""

import pytest
import torch

from mmlab.data.bucket_mixture import by_bucket
from mmlab.data.config import SourceConfig
from mmlab.data.mixture import Source
from mmlab.data.reader import GlobalBatches
from mmlab.data.upcoming import check_room
from tests.data.test_bucket_mixture import batches, make_pictures, module
from tests.tiny_servers import s3_server


def test_remote_shards_give_the_batches_of_local_ones(cache, monkeypatch, tmp_path):
    root = tmp_path / "sets"
    make_pictures(root / "a", 70)
    make_pictures(root / "b", 21, bad=4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("mmlab.data.set_buckets.SPARSE", 0.7)  # all but the largest buckets are read in ranges
    local = batches(module(root), GlobalBatches(8, 4))
    with s3_server() as client:
        for path in root.rglob("*.*"):
            client.upload_file(str(path), "bucket", path.relative_to(root).as_posix())
        listed = [SourceConfig(path="a"), SourceConfig(path="b")]
        there = module(root, root="s3://bucket", train=listed, val=[], cache=cache)
        remote = batches(there, GlobalBatches(8, 4))
        assert {source.fetched for source in remote.sources} == {True, False}
        assert not any(source.fetched for source in local.sources)
        for m in range(30):
            found, expected = remote[m], local[m]
            assert found["keys"] == expected["keys"] and torch.equal(found["pixel_values"], expected["pixel_values"])
        kept = list((tmp_path / "mmlab" / "aspect_buckets").iterdir())
        assert len(kept) == 2
        monkeypatch.setattr("mmlab.data.set_buckets._numbers", lambda *_: pytest.fail("counted again"))
        parts = by_bucket([Source("a", there.train_sources[0].index)], there.config.shapes)
        assert sum(map(len, parts)) == 70
        check_room(there.config, parts, [], 1)
