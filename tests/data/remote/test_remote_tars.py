"""Streams of remote tars equal those of local ones."""

from typing import Any

import pytest
import torch

from mmlab.config.errors import DataError
from mmlab.data.config import CacheConfig, SourceConfig, StreamLoaderConfig
from mmlab.data.reader import GlobalBatches
from mmlab.data.remote.remote_files import reader_of
from mmlab.data.remote.remote_tars import RemoteTars
from mmlab.data.stream import StreamBatches, open_streams
from mmlab.runs.shard_patterns import named_shards
from tests.data.remote.conftest import kill_fetcher, used_bytes
from tests.tiny_servers import RangeServer
from tests.tiny_shards import KeyCollate, make_shards, settings

PATTERN = "a/shard-{000000..000009}.tar"


@pytest.fixture
def server(tmp_path):
    make_shards(tmp_path / "bucket" / "a", 40, bad={7})
    with RangeServer(tmp_path / "bucket", rate=0.3, kinds=("503", "cut", "reset")) as server:
        yield server


def batches(root: str, cache: CacheConfig) -> StreamBatches:
    options: dict[str, Any] = {"train": [SourceConfig(PATTERN)], "loader": StreamLoaderConfig(shuffle=5)}
    config = settings(root=root, cache=cache, block_shards=2, bad_budget=1, **options)
    return StreamBatches(open_streams(config), KeyCollate(), GlobalBatches(4, 4), config)


def test_a_stream_of_addresses_has_the_batches_of_local_shards(server, tmp_path, cache):
    cache.gigabytes = 0.00005  # two blocks of two shards, of ten
    remote, local = batches(server.address, cache), batches(str(tmp_path / "bucket"), cache)
    for m in range(22):
        if m == 12:
            kill_fetcher(cache)
        there, here = remote[m], local[m]
        assert there.pop("waited") >= 0 and torch.equal(there.pop("x"), here.pop("x"))
        assert there == here
        assert used_bytes(cache) <= cache.bytes
    assert sum(server.faults.values()) > 0
    present = reader_of(cache).present
    assert len(present) == 2 and all(path.startswith("a-") for path in present)


def test_a_pattern_whose_ends_are_not_there_is_refused_at_once(server, cache):
    for pattern in ("a/shard-{000000..000010}.tar", "a/shard-{000009..000010}.tar"):
        with pytest.raises(DataError, match=r"there is no http.*/a/shard-000010\.tar"):
            RemoteTars(cache).check(named_shards(pattern, server.address))
    RemoteTars(cache).check(named_shards(PATTERN, server.address))
