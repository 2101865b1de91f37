import json
import logging
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from mmlab.config.errors import ConfigError, DataError, RunError
from mmlab.data.config import SourceConfig
from mmlab.data.module import ShardDataModule
from mmlab.evaluate.callbacks.data_report import DataReportCallback
from mmlab.evaluate.config import DataReportCallbackConfig
from tests.tiny_shards import KeyCollate, make_shards, settings, sources

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
GLOBAL_BATCH = 8


class Recorder(L.LightningModule):
    """Learns one number and records which samples it saw at which step, one file per rank."""

    def __init__(self, folder: Path, stop_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.folder = folder
        self.stop_at = stop_at
        self.folder.mkdir(parents=True, exist_ok=True)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        with open(self.folder / f"train-{self.global_rank}.jsonl", "a") as file:
            file.write(json.dumps([self.global_step, batch["keys"], batch["seeds"]]) + "\n")
        return ((self.weight - batch["x"]) ** 2).mean()

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        if self.global_step == self.stop_at:
            self.trainer.save_checkpoint(self.folder / "stopped.ckpt")
            self.trainer.should_stop = True

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        with open(self.folder / f"val-{self.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(batch["keys"]) + "\n")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def module_of(root: Path, **options) -> ShardDataModule:
    train = sources(*(root / name for name in ("a", "b") if (root / name).exists()))
    return ShardDataModule(settings(**{"train": train, "global_batch": GLOBAL_BATCH, **options}), KeyCollate())


def fit(
    folder: Path,
    data: ShardDataModule,
    steps: int,
    ckpt: Path | None = None,
    stop_at: int | None = None,
    devices: int = 1,
    stage: type[Recorder] = Recorder,
    **options,
) -> dict[int, tuple[list, list]]:
    """Train and return {step: (keys, seeds)} of the global batches as they were trained."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        max_epochs=-1,
        max_steps=data.plan(steps),
        accumulate_grad_batches=data.accumulation(devices),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[DataReportCallback(DataReportCallbackConfig(budget=data.config.bad_budget))],
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(stage(folder, stop_at), data, ckpt_path=str(ckpt) if ckpt else None)
    return trained(folder, devices)


def trained(folder: Path, ranks: int) -> dict[int, tuple[list, list]]:
    lines = [
        [json.loads(line) for line in (folder / f"train-{rank}.jsonl").read_text().splitlines()]
        for rank in range(ranks)
    ]
    steps: dict[int, tuple[list, list]] = {}
    for parts in zip(*lines, strict=True):
        for step, keys, seeds in parts:
            joined = steps.setdefault(step, ([], []))
            joined[0].extend(keys)
            joined[1].extend(seeds)
    return steps


@pytest.fixture
def root(tmp_path):
    make_shards(tmp_path / "a", 21)
    make_shards(tmp_path / "b", 8)
    return tmp_path


@pytest.fixture
def straight(root):
    return fit(root / "straight", module_of(root), 9)


def test_lightning_trains_the_planned_stream_across_epochs(straight):
    assert sorted(straight) == list(range(9))
    keys = list(chain(*(straight[step][0] for step in range(9))))
    assert len(keys) == 72
    for epoch in (0, 1):
        assert len(set(keys[29 * epoch : 29 * epoch + 29])) == 29


@pytest.mark.parametrize(
    ("stop_at", "then"),
    [
        (1, {}),
        (4, {"workers": 2}),
        (8, {}),
        (3, {"micro_batch": 8}),  # fewer, larger micro batches
        (3, {"micro_batch": 1}),  # more, smaller ones
        (6, {"micro_batch": 2, "workers": 1}),
    ],
)
def test_resume_equals_the_straight_run(root, straight, stop_at, then):
    folder = root / "resumed"
    fit(folder, module_of(root, micro_batch=2 if "micro_batch" not in then else 4), 9, stop_at=stop_at)
    data = module_of(root, **then)
    assert fit(folder, data, 9, ckpt=folder / "stopped.ckpt") == straight
    report = json.loads((folder / "data_report.json").read_text())
    assert report["train"]["seen"] == 72, "the counts continue after a resume"


def test_a_checkpoint_within_a_step_resumes_at_that_step(root, straight):
    class HalfStep(Recorder):
        def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
            if batch_idx == 8:  # the first half of step 4
                self.trainer.save_checkpoint(self.folder / "half.ckpt")

    folder = root / "half"
    fit(folder, module_of(root), 9, stage=HalfStep)
    state = torch.load(folder / "half.ckpt", weights_only=True)["ShardDataModule"]
    assert state["position"] == 4 * GLOBAL_BATCH
    (folder / "train-0.jsonl").unlink()
    rest = fit(folder, module_of(root), 9, ckpt=folder / "half.ckpt")
    assert rest == {step: batch for step, batch in straight.items() if step >= 4}


def test_a_finished_run_continues_with_more_steps(root, straight):
    folder = root / "longer"
    fit(folder, module_of(root), 5, stop_at=5)
    assert fit(folder, module_of(root), 9, ckpt=folder / "stopped.ckpt") == straight


def test_two_ranks_see_the_same_global_batches_and_share_one_report(root, straight):
    folder = root / "two"
    make_shards(root / "val", 7)
    data = module_of(root, val=sources(root / "val"), micro_batch=2)
    fit(folder, data, 9, devices=2, stop_at=4, num_sanity_val_steps=0)
    resumed = fit(folder, module_of(root, val=data.config.val, micro_batch=2), 9, folder / "stopped.ckpt", devices=2)
    assert resumed == straight
    report = json.loads((folder / "data_report.json").read_text())
    assert (report["ranks"], report["train"]["seen"]) == (2, 72)


def test_types_are_as_frequent_on_two_ranks_with_workers_and_after_a_resume(root):
    make_shards(root / "a", 21, types=["talk", "talk", "talk", "detail", "talk", "why", "why"], overwrite=True)
    make_shards(root / "b", 8, types=["why"], overwrite=True)
    straight = fit(root / "typed", module_of(root, balance="type"), 9)
    report = json.loads((root / "typed" / "data_report.json").read_text())["train"]
    assert {name: of["seen"] for name, of in report["types"].items()} == {"detail": 24, "talk": 24, "why": 24}
    assert all(of["share"] == pytest.approx(1 / 3) for of in report["types"].values())
    assert list(report["sources"]) == ["a/detail", "a/talk", "a/why", "b/why"]
    folder = root / "typed_two"
    two = {"balance": "type", "micro_batch": 2}
    fit(folder, module_of(root, **two), 9, devices=2, stop_at=4)
    assert fit(folder, module_of(root, **two, workers=1), 9, folder / "stopped.ckpt", devices=2) == straight
    assert json.loads((folder / "data_report.json").read_text())["train"]["types"] == report["types"]


class AsksEarly(Recorder):
    def configure_optimizers(self):
        self.trainer.fit_loop.setup_data()  # what `estimated_stepping_batches` does when max_epochs is set
        return super().configure_optimizers()


def test_data_asked_for_before_the_restore_still_resumes(root, straight):
    folder = root / "early"
    fit(folder, module_of(root), 9, stop_at=4)
    assert fit(folder, module_of(root), 9, folder / "stopped.ckpt", stage=AsksEarly) == straight


def test_data_asked_for_before_the_restore_is_refused_with_another_accumulation(root):
    folder = root / "early"
    fit(folder, module_of(root), 9, stop_at=4)
    with pytest.raises(RunError, match="at micro-batch 4, Lightning at 8"):
        fit(folder, module_of(root, micro_batch=8), 9, folder / "stopped.ckpt", stage=AsksEarly)


def test_overfitting_repeats_its_batches(root):
    folder = root / "overfit"
    batches = fit(folder, module_of(root), 6, overfit_batches=4)  # two steps of two micro batches
    assert [batches[step][0] for step in (0, 1, 2, 3)] == [batches[step][0] for step in (0, 1, 0, 1)]
    assert batches[0] != batches[1]


def test_validation_reads_each_sample_once_in_order(root):
    make_shards(root / "v", 7)
    make_shards(root / "w", 3)
    data = module_of(root, val=sources(root / "v", root / "w"))
    loader = data.val_dataloader()
    assert not isinstance(loader, list)
    for _ in range(2):
        keys = [batch["keys"] for batch in loader]
        assert [len(batch) for batch in keys] == [4, 4, 2] == [4] * (len(loader) - 1) + [2]
        assert list(chain(*keys)) == [f"v{i:04d}" for i in range(7)] + [f"w{i:04d}" for i in range(3)]
    assert module_of(root).val_dataloader() == []


def test_replacements_over_budget_stop_the_run_and_are_reported(root):
    make_shards(root / "broken", 40, bad=set(range(0, 40, 2)))
    data = module_of(root, train=sources(root / "broken"))
    with pytest.raises(DataError, match=r"'broken'.*'no-loss'"):
        fit(root / "over", data, 9)
    report = json.loads((root / "over" / "data_report.json").read_text())
    assert report["train"]["sources"]["broken"]["replaced"] > 10
    assert report["train"]["bad"][0]["reason"] == "no-loss"


def test_plan_counts_whole_global_batches(root):
    data = module_of(root)
    assert data.samples == 29
    assert data.plan(max_epochs=1) == 3
    assert data.plan(max_epochs=2) == 7  # 58 samples: nothing is dropped between the epochs
    assert data.plan(max_epochs=0.6) == 2
    assert data.plan(max_steps=5, max_epochs=2) == 5
    assert data.plan(max_steps=-1, max_epochs=2) == 7
    data.plan(max_steps=3)
    assert len(data.train_dataloader()) == 6
    with pytest.raises(ConfigError, match="no length"):
        data.plan(max_steps=-1)
    with pytest.raises(ConfigError, match="29 samples and global_batch=8"):
        data.plan(max_epochs=0.1)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"seed": 1}, ConfigError, "data.seed=0, this run has 1"),
        ({"global_batch": 16}, ConfigError, "data.global_batch=8, this run has 16"),
        ({"block_shards": 2}, ConfigError, "data.block_shards=8, this run has 2"),
        ({"balance": "type"}, ConfigError, "data.balance=size, this run has type"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(root, change, error, says):
    make_shards(root / "a", 21, types=["talk"], overwrite=True)
    make_shards(root / "b", 8, types=["why"], overwrite=True)
    state = module_of(root).state_dict()
    with pytest.raises(error, match=says):
        module_of(root, **change).load_state_dict(state)


def test_other_shards_are_refused(root):
    data = module_of(root)
    state = data.state_dict()
    weighted = [SourceConfig(str(root / name), weight=weight) for name, weight in (("a", 1.0), ("b", 2.0))]
    with pytest.raises(RunError, match="another training source 'a': the order of samples would change"):
        module_of(root, train=weighted).load_state_dict(state)
    with pytest.raises(RunError, match="another order of the training sources"):
        module_of(root, train=sources(root / "b", root / "a")).load_state_dict(state)
    make_shards(root / "new" / "b", 9)
    new = module_of(root, train=sources(root / "a", root / "new" / "b"))
    with pytest.raises(RunError, match="another training source 'b'"):
        new.load_state_dict(state)


def test_a_trainer_that_steps_elsewhere_is_refused(root):
    data = module_of(root)
    trainer = L.Trainer(accelerator="cpu", max_steps=data.plan(2), logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=1.* need 2"):
        trainer.fit(Recorder(root / "wrong"), data)


def test_sources_and_their_weights_are_checked(root):
    weighted = [SourceConfig(str(root / "a"), weight=1.0), *sources(root / "b")]
    with pytest.raises(ConfigError, match=r"'data\.train\.1' has no weight; give every source one"):
        module_of(root, train=weighted)
    with pytest.raises(ConfigError, match=r"data\.balance=type weights the response types; leave out the weights"):
        module_of(root, train=weighted[:1], balance="type")
    with pytest.raises(ConfigError, match=r"'balance' cannot be 'types'\. Did you mean 'type'"):
        module_of(root, balance="types")
    with pytest.raises(ConfigError, match="no source"):
        module_of(root, train=[])


@pytest.mark.parametrize(("val", "total"), [(True, 9), (False, 30)])
def test_a_spread_goes_over_all_sources_without_moving_the_position(tmp_path, val, total):
    make_shards(tmp_path / "a", 21)
    make_shards(tmp_path / "b", 9)
    data = module_of(tmp_path, val=sources(tmp_path / "b") if val else [])
    data.plan(4)
    whole = [key for batch in data.spread(100) for key in batch["keys"]]
    assert len(set(whole)) == total
    some = [key for batch in data.spread(4) for key in batch["keys"]]
    assert some == whole[:: total // 4][: len(some)] and 4 <= len(some) < 8
    assert data.position == 0
