"""Training on remote shards equals training on the same shards from disk, whatever is killed."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from mmlab.config.locations import Url
from mmlab.data.batch_loader import LocalLoader
from mmlab.data.config import CacheConfig, ShardsConfig, SourceConfig
from mmlab.data.mixture import by_type, open_sources
from mmlab.data.module import ShardDataModule
from mmlab.data.reader import GlobalBatches, LocalBatches, OnePass
from mmlab.data.remote.fetch_metrics import FetchMetrics
from mmlab.data.upcoming import check_room
from mmlab.evaluate.callbacks.data_report import DataReportCallback
from mmlab.evaluate.config import DataReportCallbackConfig
from mmlab.training.resume_proof import FETCHING, difference, read_batches
from tests.data.remote.conftest import kill_fetcher, used_bytes
from tests.tiny_servers import s3_server
from tests.tiny_shards import KeyCollate, make_shards, settings
from tests.tiny_trainer import Keys, run
from tests.training.test_checkpoint import Noisy, last_state, train

BUCKET: Any = Url("s3://bucket")
ROOM = 0.00016
"""GB: of the 29 shards with their tables, 13 fit."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Iterator[Path]:
    """The sets `a` and `b`, which lie in the bucket, too."""
    root = tmp_path_factory.mktemp("shards")
    make_shards(root / "a", 61, bad={5, 6, 30}, types=("short", "long"))
    make_shards(root / "b", 50, types=("short", "long", "list"))
    with s3_server() as client:
        for path in root.rglob("*.*"):
            client.upload_file(str(path), "bucket", path.relative_to(root).as_posix())
        yield root


def config(root: Path | Url, cache: CacheConfig, **options: Any) -> ShardsConfig:
    listed = [SourceConfig(path="a"), SourceConfig(path="b")]
    options = {"global_batch": 2, "micro_batch": 1, **options}
    return settings(root=str(root), train=listed, block_shards=2, bad_budget=1, cache=cache, **options)


def batches(shards: ShardsConfig, world: int = 1, rank: int = 0, once: bool = False) -> LocalBatches:
    sources = open_sources(shards, shards.train)
    if shards.balance == "type":
        sources = by_type(sources)
    check_room(shards, sources, [], world)
    cut = OnePass(111, 4, world, rank) if once else GlobalBatches(2, 2 // world, world, rank)
    return LocalBatches(sources, KeyCollate(), cut, shards)


def same(remote: dict[str, Any], local: dict[str, Any]) -> bool:
    assert remote.pop("waited") >= 0
    assert torch.equal(remote.pop("x"), local.pop("x"))
    # Messages name the place of the samples, keys and reasons are the same.
    return remote == local


@pytest.mark.parametrize(("context", "ranks", "workers", "stop"), [("fork", (0, 1), 3, 120), ("spawn", (1,), 1, 20)])
def test_ranks_and_workers_get_the_batches_of_local_shards(root, cache, context, ranks, workers, stop):
    cache.gigabytes = ROOM
    local = [batches(config(root, cache), 2, rank) for rank in ranks]
    remote = [batches(config(BUCKET, cache, workers=workers), 2, rank) for rank in ranks]
    loaders = [LocalLoader(each, stop, lambda: 0, workers, context=context) for each in remote]
    for m, items in enumerate(zip(*map(iter, loaders), strict=True)):
        assert all(same(item, batches[m]) for item, batches in zip(items, local, strict=True))
    assert 0 < used_bytes(cache) <= cache.bytes
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("options", [{"balance": "type"}, {"once": True}])
def test_parts_by_type_and_a_pass_equal_those_of_local_shards(root, cache, options):
    cache.gigabytes = 4 * ROOM
    once = options.pop("once", False)
    local, remote = (batches(config(place, cache, **options), once=once) for place in (root, BUCKET))
    assert all(same(remote[m], local[m]) for m in range(28))


def test_killing_the_fetcher_changes_nothing(root, cache):
    cache.gigabytes = ROOM
    local, remote = (batches(config(place, cache)) for place in (root, BUCKET))
    for m in range(120):
        if m % 30 == 3:
            kill_fetcher(cache)
        assert same(remote[m], local[m])


def test_what_is_measured(root, cache):
    measures = FetchMetrics(cache)
    assert measures.values(1) == {"data/wait": 0, "data/fetch_mb_s": 0, "data/cache_hit": 1}
    remote = batches(config(BUCKET, cache))
    for m in range(60):
        measures.add(remote[m])
    first = measures.values(16)
    assert first["data/wait"] > 0 and first["data/fetch_mb_s"] > 0 and 0 < first["data/cache_hit"] < 1
    assert first.keys() == set(FETCHING)
    measures.add({"waited": 3.0})
    assert measures.values(18)["data/wait"] == 1.5


class KillProcess(L.Callback):
    """Kills the process after a micro-batch, or in validation."""

    def __init__(self, number: int):
        self.number = number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == self.number:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_was_killed_and_resumed_equals_a_local_one(root, cache, tmp_path):
    cache.gigabytes = 2 * ROOM
    options = {"block_shards": 2, "bad_budget": 1, "cache": cache}
    train(root, tmp_path / "local", **options)
    fork: Any = multiprocessing.get_context("fork")
    for number in (5, 14):
        run = fork.Process(
            target=train, args=(BUCKET, tmp_path / "remote", KillProcess(number)), kwargs={**options, "workers": 2}
        )
        run.start()
        run.join()
        assert run.exitcode == -signal.SIGKILL
    train(BUCKET, tmp_path / "remote", workers=1, **options)
    assert read_batches(tmp_path / "remote") == (read_batches(tmp_path / "local")[0], [])
    assert difference(last_state(tmp_path / "remote"), last_state(tmp_path / "local")) is None


class Logged(L.Callback):
    """The metrics that the run logs."""

    def on_train_end(self, trainer, pl_module) -> None:
        self.names = {name for name in trainer.callback_metrics if name.startswith("data/")}


@pytest.mark.parametrize("remote", [False, True])
def test_runs_on_remote_shards_log_what_is_measured(root, cache, tmp_path, remote):
    data = ShardDataModule(config(BUCKET if remote else root, cache), Keys())
    report, logged = DataReportCallback(DataReportCallbackConfig(budget=1)), Logged()
    run(Noisy(), data, tmp_path, 3, [report, logged], log_every_n_steps=1, default_root_dir=tmp_path)
    assert logged.names == {"data/replaced", *(FETCHING if remote else ())}
