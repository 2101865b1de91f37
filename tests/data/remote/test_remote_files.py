"""Sets of shards in an object store, read through the shard cache, against a server that stands for S3."""

import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mmlab.config.errors import ConfigError, DataError
from mmlab.config.locations import Url
from mmlab.data.config import CacheConfig, SourceConfig
from mmlab.data.index import ShardIndex
from mmlab.data.local_files import OpenFile
from mmlab.data.manifest import Manifest
from mmlab.data.mixture import Source
from mmlab.data.reader import GlobalBatches, LocalBatches, OnePass
from mmlab.data.remote.remote_files import RemoteFiles, open_copy, reader_of
from mmlab.data.upcoming import check_addresses
from mmlab.runs.index_files import VARIABLE, index_folders
from tests.tiny_servers import RangeServer, etag_of, s3_environment
from tests.tiny_shards import KeyCollate, make_shards, settings

SHARD = "shard-000001.tar"
BUCKET = Url("s3://bucket")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Iterator[Path]:
    """The folder that the server shows as `s3://bucket`."""
    folder = tmp_path_factory.mktemp("server")
    with RangeServer(folder) as server, s3_environment(server.address):
        yield folder / "bucket"


@pytest.fixture
def folder(bucket, request) -> Path:
    """A set of ten samples in three shards, which the test may change."""
    folder = bucket / request.node.name.replace("[", "-").strip("]")
    make_shards(folder, 10)
    manifest = Manifest.of((folder / "index/manifest.json").read_bytes())
    entries = [replace(entry, etag=etag_of(folder / entry.name)) for entry in manifest.entries]
    (folder / "index/manifest.json").write_text(Manifest(entries, manifest.notes).to_json())
    return folder


def address(folder: Path) -> Url:
    return BUCKET / folder.name


def opened(folder: Path, cache: CacheConfig) -> ShardIndex:
    return ShardIndex.open(address(folder), cache)


def want(index: ShardIndex, *shards: int) -> None:
    files = index.files
    assert isinstance(files, RemoteFiles)
    reader_of(files.cache).want(files, [(files, index.manifest.entries[shard]) for shard in shards])


def copies(cache: CacheConfig, suffix: str = ".tar") -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in cache.path.rglob(f"*{suffix}"))


def test_a_sample_is_read_in_a_range_and_a_wanted_shard_as_a_whole(folder, cache):
    local, index = ShardIndex.open(folder), opened(folder, cache)
    assert (index.hash, len(index), index.shards) == (local.hash, 10, local.shards)
    assert index.read(9) == local.read(9) and index.keys[9] == local.keys[9]
    assert copies(cache) == [] and copies(cache, ".safetensors") == ["shard-000002"]
    want(index, 1)
    assert [index.read(i) for i in range(4, 8)] == [local.read(i) for i in range(4, 8)]
    assert copies(cache) == ["shard-000001"]


def test_a_pickled_index_takes_the_copy_of_the_manifest(folder, cache):
    index = opened(folder, cache)
    (folder / "index/manifest.json").unlink()
    again = pickle.loads(pickle.dumps(index))
    assert again.hash == index.hash and again.read(3) == index.read(3)
    assert isinstance(again.files, RemoteFiles) and again.files.cache == cache


def test_an_index_elsewhere_serves_for_an_address(folder, cache, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "indexes"))
    elsewhere = index_folders(address(folder))[1]
    shutil.move(folder / "index", elsewhere)
    index = opened(folder, cache)
    want(index, 0)
    assert index.read(0)["json"] and pickle.loads(pickle.dumps(index)).hash == index.hash
    assert copies(cache, ".safetensors") == []


def test_copies_that_are_not_wanted_are_closed(folder, cache):
    index = opened(folder, cache)
    want(index, 0, 1)
    assert index.read(0) != index.read(4)
    assert isinstance(index.files, RemoteFiles) and set(index.files._open) == {"shard-000000.tar", SHARD}
    want(index, 1)
    assert set(index.files._open) == {SHARD}


@pytest.mark.parametrize("wanted", [True, False])
def test_an_index_that_was_rebuilt_in_the_bucket_is_an_error(folder, cache, wanted, tmp_path):
    index = opened(folder, cache)
    make_shards(tmp_path / "other", 10)
    shutil.copytree(tmp_path / "other", folder, dirs_exist_ok=True)
    if wanted:
        want(index, 1)
    with pytest.raises(DataError, match=r"the index of s3://bucket/.* was rebuilt with other contents while"):
        index.read(4)
    assert isinstance(index.files, RemoteFiles) and index.files.copy
    index.files.copy.unlink()
    with pytest.raises(DataError, match="was rebuilt with other contents"):
        pickle.loads(pickle.dumps(index))


@pytest.mark.parametrize("wanted", [True, False])
def test_a_shard_that_was_replaced_in_the_bucket_is_an_error(folder, cache, wanted):
    index = opened(folder, cache)
    data = bytearray((folder / SHARD).read_bytes())
    data[-1] = 1
    (folder / SHARD).write_bytes(data)
    if wanted:
        want(index, 1)
    with pytest.raises(DataError, match=f"{SHARD} has changed since it was indexed"):
        index.read(4)


def test_wrong_bytes_are_fetched_again_and_then_an_error(folder, cache):
    text = (folder / "index/manifest.json").read_text()
    (folder / "index/manifest.json").write_text(text.replace(json.dumps(etag_of(folder / SHARD)), "null"))
    index = opened(folder, cache)
    want(index, 1)
    right = index.read(4)
    (copy,) = cache.path.rglob("shard-000001-*.tar")
    copy.write_bytes(copy.read_bytes().replace(b"number 4", b"number 5"))
    assert index.read(4) == right
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes().replace(b"number 4", b"number 5"))
    copy.write_bytes((folder / SHARD).read_bytes())
    with pytest.raises(DataError, match=f"{SHARD} has wrong content in two downloads"):
        index.read(4)


def test_a_copy_that_is_deleted_before_it_is_open_is_fetched_again(tmp_path):
    paths = [tmp_path / "0", tmp_path / "1", tmp_path / "2", tmp_path / "3"]
    paths[2].touch()
    fetched = iter(paths)
    assert open_copy(lambda: next(fetched), OpenFile, BUCKET / SHARD).fd >= 0 and next(fetched) == paths[3]
    with pytest.raises(DataError, match=f"the copy of s3://bucket/{SHARD} is deleted again and again by another"):
        open_copy(lambda: paths[0], OpenFile, BUCKET / SHARD)

    def fails(path: Path) -> None:
        raise DataError("too many open files")

    with pytest.raises(DataError, match="too many"):
        open_copy(lambda: paths[2], fails, BUCKET / SHARD)


def test_a_wrong_copy_of_the_manifest_is_fetched_again(folder, cache):
    index = opened(folder, cache)
    assert isinstance(index.files, RemoteFiles) and index.files.copy
    copy = index.files.copy
    copy.write_bytes(b"\xff" + copy.read_bytes()[1:])
    assert opened(folder, cache).hash == index.hash
    assert copy.read_bytes() == (folder / "index/manifest.json").read_bytes()


def test_an_address_without_an_index_or_a_bucket_is_an_error(folder, cache):
    shutil.rmtree(folder / "index")
    message = f"{address(folder)} has no index; build it with `mmlab shards index {address(folder)}`."
    with pytest.raises(DataError, match=message):
        opened(folder, cache)
    (folder / "index").mkdir()
    (folder / "index/manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot be read .*; rebuild it with `mmlab shards index"):
        opened(folder, cache)


def test_missing_credentials_are_an_error_without_secrets(folder, cache, monkeypatch):
    monkeypatch.setenv("HOME", str(cache.path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(DataError, match="there are no credentials for s3://bucket/") as error:
        opened(folder, cache)
    assert "testing" not in str(error.value) and "\n" not in str(error.value)


def test_a_cache_without_room_for_what_is_read_is_an_error(folder, cache):
    options: Any = {"_target_": "x", "root": str(BUCKET), "train": [SourceConfig(path=folder.name)], "cache": cache}
    sizes = sorted(entry.bytes + entry.table_bytes for entry in opened(folder, cache).manifest.entries)

    def check(workers: int) -> None:
        shards = settings(**options, block_shards=1, global_batch=1, micro_batch=1, workers=workers)
        check_addresses(OmegaConf.create({"data": shards, "trainer": {"devices": 1, "num_nodes": 1}}))

    cache.gigabytes = sum(sizes[-2:]) / 1e9
    check(workers=0)  # two blocks
    message = r"read at the same time take up to (\S+) GB, but the shard cache holds (\S+) GB; .*block_shards"
    with pytest.raises(ConfigError, match=message):
        check(workers=2)  # eight samples are under way, which may be of all shards
    cache.gigabytes = sum(sizes) / 1e9
    check(workers=2)


def test_what_is_wanted_follows_the_order(folder, cache, monkeypatch):
    index = opened(folder, cache)
    cache.ahead = 1
    told = []
    reader = reader_of(cache)
    monkeypatch.setattr(
        reader, "want", lambda _, *lists: told.append([[entry.name[9:12] for _, entry in shards] for shards in lists])
    )
    shards = settings(block_shards=1, cache=cache)
    batches = LocalBatches([Source("s", index)], KeyCollate(), OnePass(10, 4), shards)
    for m in range(3):
        batches[m]
    assert told[:2] == [[["000"], ["001"], ["002"]], [[], ["001"], ["002"]]]
    assert told[-2:] == [[["002"], ["000"], ["001"]], [[], ["000"], ["001"]]], "the next pass begins at the start"
    told.clear()
    batches = LocalBatches([Source("s", index)], KeyCollate(), GlobalBatches(8, 8), shards)
    order = [f"{s:03d}" for epoch in range(4) for (s,) in batches.orders[0].blocks(epoch)]
    for m in range(3):
        batches[m]
    assert told[0] == [[order[0]], [order[1]], [order[2]]]
    now = [shard for shard, _ in groupby(present[0] for present, _, _ in told if present)]
    assert now == [shard for shard, _ in groupby(order)][: len(now)] and len(now) > 5


def test_local_and_remote_sets_are_read_in_turn(folder, cache, tmp_path):
    here = make_shards(tmp_path / "here", 10)
    remote = opened(folder, cache)
    for cut in (OnePass(20, 4), GlobalBatches(4, 4)):
        shards = settings(block_shards=1, cache=cache)
        mixed = LocalBatches([Source("a", here), Source("b", remote)], KeyCollate(), cut, shards)
        local = LocalBatches([Source("a", here), Source("b", ShardIndex.open(folder))], KeyCollate(), cut, shards)
        assert [mixed[m]["seeds"] for m in range(5)] == [local[m]["seeds"] for m in range(5)]
    assert copies(cache) == ["shard-000000", "shard-000001", "shard-000002"]
