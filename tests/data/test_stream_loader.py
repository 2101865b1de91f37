import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlab.config.errors import ConfigError, RunError
from mmlab.data.config import StreamLoaderConfig
from mmlab.data.module import ShardDataModule
from mmlab.data.reader import GlobalBatches
from mmlab.data.stream import StreamBatches, open_streams
from mmlab.data.stream_loader import StreamLoader
from tests.data.test_module import AsksEarly, fit
from tests.tiny_shards import KeyCollate, make_shards, settings, sources


@pytest.fixture
def root(tmp_path) -> Path:
    make_shards(tmp_path / "a", 41)
    return tmp_path


def module_of(root: Path, shuffle: int = 3, **options: Any) -> ShardDataModule:
    samples = options.pop("samples", None)
    loader = StreamLoaderConfig(shuffle=shuffle, samples=samples)
    config = settings(**{"train": sources(root / "a"), "block_shards": 2, "loader": loader, **options})
    return ShardDataModule(config, KeyCollate(), StreamLoader(loader))


@pytest.mark.parametrize(("devices", "workers"), [(1, 0), (1, 2), (2, 1)])
def test_a_resumed_run_has_the_batches_of_a_straight_one(root, capfd, devices, workers):
    options = {"micro_batch": 4 // devices, "workers": workers}
    straight = fit(root / "straight", module_of(root, **options), 12, devices=devices)
    assert capfd.readouterr().out.count("data/loader=stream: the order of samples depends on") == 1
    assert len(set(chain(*(straight[step][0] for step in range(4))))) == 32
    for stop_at in (1, 7):
        folder = root / f"stopped-{stop_at}"
        fit(folder, module_of(root, **options), 12, stop_at=stop_at, devices=devices)
        resumed = fit(folder, module_of(root, **options), 12, folder / "stopped.ckpt", devices=devices)
        assert resumed == straight
        assert json.loads((folder / "data_report.json").read_text())["train"]["seen"] == 96
    assert "starts a new pass, in which" not in capfd.readouterr().err


def test_data_asked_for_before_the_restore_still_resumes(root):
    straight = fit(root / "straight", module_of(root), 9)
    fit(root / "early", module_of(root), 9, stop_at=4)
    assert fit(root / "early", module_of(root), 9, root / "early" / "stopped.ckpt", stage=AsksEarly) == straight


def test_another_accumulation_continues_in_the_shards(root):
    fit(root / "other", module_of(root), 5, stop_at=2)
    batches = fit(root / "other", module_of(root, micro_batch=8), 5, root / "other" / "stopped.ckpt")
    keys = list(chain(*(batches[step][0] for step in range(5))))
    assert len(set(keys)) == 40, "none of a pass is seen twice or left out"


@pytest.mark.parametrize("then", [{"workers": 2}, {"devices": 2, "micro_batch": 2}])
def test_with_other_workers_or_ranks_a_new_pass_begins(root, capfd, then):
    devices = then.pop("devices", 1)
    folder = root / "other"
    fit(folder, module_of(root), 8, stop_at=2)
    (folder / "train-0.jsonl").unlink()
    data = module_of(root, **then)
    batches = fit(folder, data, 8, folder / "stopped.ckpt", devices=devices)
    workers = then.get("workers", 1)
    says = f"the checkpoint was made by 1 rank x 1 worker, and this run has {devices} rank"
    assert capfd.readouterr().err.count(says) == 1
    first = StreamBatches(
        open_streams(data.config), KeyCollate(), GlobalBatches(8, data.config.micro_batch, devices), data.config
    )
    first.start(4 // devices, [{"a": [1, 0, 0]}] * workers)
    assert batches[2][0][: data.config.micro_batch] == first[4 // devices]["keys"]


def test_overfitting_repeats_its_batches(root):
    batches = fit(root / "overfit", module_of(root, workers=1), 6, overfit_batches=4)
    assert [batches[step][0] for step in range(4)] == [batches[step][0] for step in (0, 1, 0, 1)]
    assert batches[0] != batches[1]


def test_a_pass_has_the_samples_that_the_settings_state(root):
    assert module_of(root, samples=41).plan(max_epochs=2) == 10
    assert module_of(root).plan(max_steps=3) == 3
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs counts samples.*data\.loader\.samples"):
        module_of(root).plan(max_steps=3, max_epochs=1)


def test_shards_that_were_replaced_are_refused(root):
    state = module_of(root).state_dict()
    module_of(root).load_state_dict(state)
    make_shards(root / "a", 45, overwrite=True)
    with pytest.raises(RunError, match="another training source 'a'"):
        module_of(root).load_state_dict(state)


def test_the_state_is_plain_and_holds_the_place_of_each_worker(root):
    fit(root / "run", module_of(root, workers=2), 6, stop_at=3)
    state = torch.load(root / "run" / "stopped.ckpt", weights_only=True)["ShardDataModule"]["stream"]
    assert state == {"workers": 2, "places": [[{"a": [0, 1, 4]}, {"a": [0, 1, 4]}]]}


@pytest.mark.parametrize("val", [True, False])
def test_a_spread_reads_validation_or_the_begin_of_the_stream(root, val):
    make_shards(root / "b", 9)
    data = module_of(root, val=sources(root / "b") if val else [])
    keys = [key for batch in data.spread(9) for key in batch["keys"]]
    assert {key[0] for key in keys} == {"b" if val else "a"}
    assert len(keys) == (9 if val else 8) and len(set(keys)) == len(keys)
    assert {key[0] for batch in data.spread(9, training=True) for key in batch["keys"]} == {"a"}
    assert data.position == 0
