import pickle
from itertools import chain

import pytest

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.config import SourceConfig
from mmlab.data.mixture import Source
from mmlab.data.reader import LocalBatches, OnePass
from mmlab.data.walked_shards import WalkedShards, open_or_walk
from mmlab.runs.index_files import INDEX_NAME
from tests.tiny_shards import KeyCollate, make_shards, plain_tar, settings


def test_one_pass_is_that_of_indexed_shards(tmp_path):
    index = make_shards(tmp_path / "a", 7, types=["talk"])
    walked = WalkedShards(sorted((tmp_path / "a").glob("*.tar")))
    passes = [
        [LocalBatches([Source("a", shards)], KeyCollate(), OnePass(7, 4), settings())[m] for m in range(2)]  # type: ignore[arg-type]
        for shards in (index, pickle.loads(pickle.dumps(walked)))
    ]
    seeds = [list(chain(*(batch["seeds"] for batch in batches))) for batches in passes]
    assert seeds[0] == seeds[1]
    keys = [list(chain(*(batch["keys"] for batch in batches))) for batches in passes]
    shards = [f"{index.shards[index.place(i)[0]]}/" for i in range(7)]
    assert keys[1] == [shard + key for shard, key in zip(shards, keys[0], strict=True)]


def test_a_repeated_key_is_replaced_and_its_members_are_never_mixed(tmp_path):
    path = plain_tar(tmp_path / "s" / "0.tar", *((f"{name}.json", b"{}") for name in "abca"))
    batch = LocalBatches([Source("s", WalkedShards([path]))], KeyCollate(), OnePass(4, 4), settings())[0]  # type: ignore[arg-type]
    assert [(bad["key"], bad["reason"]) for bad in batch["bad"]] == [("0.tar/a", "key")]


def test_indexes_are_opened_and_the_rest_is_walked_over(tmp_path):
    make_shards(tmp_path / "a", 3)
    make_shards(tmp_path / "b", 2)
    for file in (tmp_path / "b" / INDEX_NAME).iterdir():
        file.unlink()
    listed = [SourceConfig("a"), SourceConfig("b/shard-{000000..000000}.tar", name="c")]
    sources = open_or_walk(settings(root=str(tmp_path)), listed)
    assert [(source.name, len(source)) for source in sources] == [("a", 3), ("c", 2)]
    assert isinstance(sources[1].index, WalkedShards) and not isinstance(sources[0].index, WalkedShards)
    assert sources[1].index.hash != WalkedShards([plain_tar(tmp_path / "0.tar", ("b0000.json", b"{}"))]).hash
    with pytest.raises(ConfigError, match="two sources are named 'b'"):
        open_or_walk(settings(root=str(tmp_path)), [SourceConfig("b"), SourceConfig("b/shard-000000.tar")])


def test_shards_without_samples_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"hold no samples, only \.url \(1\)"):
        WalkedShards([plain_tar(tmp_path / "0.tar", ("a.url", b""))])
