import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from mmlab.config.errors import DataError, RunError
from mmlab.data.batch_loader import IGNORED, LocalLoader
from mmlab.data.image_collate import stack
from mmlab.data.mixture import Source
from mmlab.data.reader import GlobalBatches, LocalBatches
from tests.tiny_shards import KeyCollate, make_shards, settings


def from_the_start() -> int:
    return 0


@pytest.fixture
def data(tmp_path):
    sources = [Source("a", make_shards(tmp_path / "a", 13)), Source("b", make_shards(tmp_path / "b", 6))]
    return LocalBatches(sources, KeyCollate(), GlobalBatches(4, 2), settings(seed=3))


@pytest.mark.parametrize(("workers", "context"), [(0, None), (1, "fork"), (3, "fork"), (1, "spawn")])
def test_workers_change_nothing(data, workers, context):
    loader = LocalLoader(data, 9, lambda: 2, workers=workers, context=context)
    batches = list(loader)
    loader.close()
    assert [batch["keys"] for batch in batches] == [data[m]["keys"] for m in range(2, 9)]
    assert [batch["seeds"] for batch in batches] == [data[m]["seeds"] for m in range(2, 9)]
    assert len(loader) == 9


def test_the_start_is_called_at_each_first_batch(data):
    start = 0
    loader = LocalLoader(data, 6, lambda: start, 1)
    iterator = iter(loader)
    start = 4  # a checkpoint is restored after the iterator was made
    assert next(iterator)["keys"] == data[4]["keys"]
    start = 1
    assert next(iter(loader))["keys"] == data[1]["keys"], "persistent workers start again at the new place"
    loader.close()


def worker_pids(loader) -> list[int]:
    return [worker.pid for worker in loader._loader._iterator._workers]


def test_workers_ignore_the_signals_of_a_cluster(data):
    loader = LocalLoader(data, 12, from_the_start, 2)
    batches = iter(loader)
    next(batches)
    for pid in worker_pids(loader):
        for number in IGNORED:
            os.kill(pid, number)
    assert len(list(batches)) == 11
    loader.close()


def test_a_killed_worker_is_a_clean_error(data):
    loader = LocalLoader(data, 1000, from_the_start, 1)
    batches = iter(loader)
    next(batches)
    os.kill(worker_pids(loader)[0], signal.SIGKILL)
    time.sleep(0.1)  # nothing is raised here, where a checkpoint might be being written
    with pytest.raises(RunError, match="worker died"):
        list(batches)
    loader.close()


@pytest.mark.parametrize("alive", [False, True])
def test_a_worker_that_dies_while_it_hands_over_a_batch(data, monkeypatch, alive):
    """Its tensors then cannot be fetched; an error of that kind means something else while all workers live."""
    loader = LocalLoader(data, 1000, from_the_start, 1)
    batches = iter(loader)
    next(batches)
    if not alive:
        os.kill(worker_pids(loader)[0], signal.SIGKILL)
        loader._workers[0].join()

    def broken(_) -> None:
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr(type(loader._loader._iterator), "_next_data", broken)
    with pytest.raises(ConnectionResetError if alive else RunError, match="Connection reset" if alive else "died"):
        next(batches)
    loader.close()


def test_an_error_for_the_user_leaves_a_worker_as_one_sentence(tmp_path):
    broken = [Source("s", make_shards(tmp_path / "s", 2, bad={0, 1}))]
    data = LocalBatches(broken, KeyCollate(), GlobalBatches(2, 2), settings())
    loader = LocalLoader(data, 3, from_the_start, 1)
    with pytest.raises(DataError) as caught:
        list(loader)
    loader.close()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("then", ["", "del loader, batches", "raise SystemExit(0)"])
def test_python_exits_although_workers_still_wait(tmp_path, then):
    make_shards(tmp_path / "s", 8)
    script = f"""
        from mmlab.data.index import ShardIndex
        from mmlab.data.batch_loader import LocalLoader
        from mmlab.data.mixture import Source
        from mmlab.data.reader import GlobalBatches, LocalBatches
        from tests.tiny_shards import KeyCollate, settings
        sources = [Source("s", ShardIndex.open({str(tmp_path / "s")!r}))]
        data = LocalBatches(sources, KeyCollate(), GlobalBatches(2, 2), settings())
        loader = LocalLoader(data, 100, lambda: 0, 2)
        batches = iter(loader)
        print(next(batches)["keys"])
        {then}
    """
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        timeout=60,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")


class Stacks(Dataset):
    def __getitem__(self, m: int) -> bool:
        return stack([{"pixels": torch.ones(3)}, {"pixels": torch.zeros(3)}])["pixels"].is_shared()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_stacks_into_shared_memory(workers):
    assert list(LocalLoader(Stacks(), 1, lambda: 0, workers)) == [workers > 0]
