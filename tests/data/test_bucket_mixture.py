"""Batches of one bucket each: the same for any ranks and micro-batches, and every image once per pass of its bucket."""

import pickle
from collections import Counter
from itertools import chain
from typing import Any, cast

import pytest
import torch

from mmlab.config.errors import ConfigError
from mmlab.data.aspects import shape_name
from mmlab.data.batch_loader import LocalLoader
from mmlab.data.bucket_mixture import BucketMixture, bucket_sizes, small_buckets
from mmlab.data.config import AspectBucketsConfig, ImageDataConfig, SourceConfig
from mmlab.data.counters import DataReport
from mmlab.data.image_collate import ImageCollate
from mmlab.data.image_condition import Conditioning
from mmlab.data.index import ShardIndex
from mmlab.data.module import ShardDataModule
from mmlab.data.reader import BucketPass, GlobalBatches, LocalBatches
from mmlab.data.sample_types import ImageSpec
from mmlab.data.shard_files import ShardWriter
from mmlab.data.shard_stats import stats
from tests.data.test_module import Recorder, fit
from tests.tiny_files import png
from tests.tiny_shards import sources

SIDES = [(30, 30), (40, 30), (30, 45), (64, 20), (33, 30), (20, 40), (28, 28)]
BUCKETS = AspectBucketsConfig(max_aspect=2, step=4)


def make_pictures(root, count: int, bad: int | None = None) -> ShardIndex:
    """Pictures of `SIDES` in turn, five in a shard; one of them is cut."""
    with ShardWriter(root, 5, quiet=True) as writer:
        for i in range(count):
            picture = png(*SIDES[i % len(SIDES)], color=f"hsl({9 * i % 256},50%,40%)")
            writer.write(f"{root.name}{i:03d}", {"png": picture[:60] if i == bad else picture, "json": {}})
    return writer.index


class Images(Recorder):
    """Learns from the brightness of images, and records what it saw."""

    def training_step(self, batch, batch_idx):
        assert batch["pixel_values"].dim() == 4
        x = batch["pixel_values"].float().mean((1, 2, 3)) / 255
        return super().training_step({**batch, "x": x, "seeds": batch["seeds"].tolist()}, batch_idx)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    make_pictures(root / "a", 70)
    make_pictures(root / "b", 21, bad=4)
    return root


def config(folder, **options) -> ImageDataConfig:
    listed = sources(folder / "a", folder / "b")
    own = {"size": 16, "buckets": BUCKETS, "train": listed, "val": listed, "bad_budget": 1, "block_shards": 3}
    return ImageDataConfig(**{**own, "global_batch": 8, "micro_batch": 8, "seed": 0, **options})


def module(folder, **options) -> ShardDataModule:
    data = config(folder, **options)
    return ShardDataModule(data, ImageCollate(data, Conditioning()))


def validation(data: ShardDataModule) -> list[dict[str, Any]]:
    return list(cast(LocalLoader, data.val_dataloader()))


def batches(data: ShardDataModule, cut) -> LocalBatches:
    return LocalBatches(data.train_sources, data.collate, cut, data.config)


def test_a_step_has_the_same_images_of_one_bucket_for_any_ranks_and_micro_batches(root):
    data = module(root)
    whole = batches(data, GlobalBatches(8, 8))
    spawned = pickle.loads(pickle.dumps(whole))
    shapes, seeds = set(), set()
    for step in range(20):
        expected = whole[step]
        seeds |= set(expected["seeds"].tolist())
        shapes.add(expected["pixel_values"].shape[2:])
        assert spawned[step]["keys"] == expected["keys"]
        for world, micro in ((1, 2), (2, 4), (4, 2)) if step in (3, 17) else ():
            parts = [
                batches(data, GlobalBatches(8, micro, world, rank))[step * (8 // (world * micro)) + turn]
                for turn in range(8 // (world * micro))
                for rank in range(world)
            ]
            assert list(chain(*(part["keys"] for part in parts))) == expected["keys"]
            for name in ("pixel_values", "seeds"):
                assert torch.equal(torch.cat([part[name] for part in parts]), expected[name])
    assert shapes == {torch.Size(shape) for shape in bucket_sizes(data.train_sources)} and len(shapes) > 3
    assert len(seeds) == 20 * 8, "no two buckets draw the same numbers"


def test_every_image_is_seen_once_before_any_of_its_bucket_is_seen_again(root):
    data = module(root)
    parts = data.train_sources
    assert sum(map(len, parts)) == data.samples == 91
    mixture, seen = BucketMixture(parts, 8), [Counter[int]() for _ in parts]
    steps = Counter[int]()
    orders = batches(data, GlobalBatches(8, 8)).orders
    for position in range(91 * 8):
        assert mixture.served(position) == [count.total() for count in seen]
        part, cursor = mixture.at(position)
        assert cursor == seen[part].total()
        seen[part][orders[part].sample(*divmod(cursor, len(parts[part])))] += 1
        steps[part] += 1
        assert max(seen[part].values()) - min(seen[part][i] for i in range(len(parts[part]))) <= 1
        if position % 91 == 90:  # the shares of the buckets, which are of whole batches
            passes = [count.total() / len(part) * 91 / (position + 1) for count, part in zip(seen, parts, strict=True)]
            assert all(abs(share - 1) * len(part) < 3 * 8 for share, part in zip(passes, parts, strict=True))
    assert all(set(count.values()) == {8} for count in seen), "after as many steps as images, exactly"
    numbers = [source.number(i) for source in parts if source.name == "a" for i in range(len(source))]
    assert sorted(numbers) == list(range(70))


def test_weights_are_those_of_the_sources_in_every_bucket(root):
    listed = [{"path": str(root / "a"), "weight": 1}, {"path": str(root / "b"), "weight": 3}]
    parts = module(root, train=[SourceConfig(**one) for one in listed]).train_sources
    mixture, served = BucketMixture(parts, 8), Counter[str]()
    for part, count in zip(parts, mixture.served(8 * 4000), strict=True):
        served[part.name] += count
    assert served["b"] / served.total() == pytest.approx(0.75, abs=0.002)
    shares = Counter({part.name + str(part.bucket.shape): len(part) for part in parts})  # type: ignore[union-attr]
    for part, count in zip(parts, mixture.served(8 * 4000), strict=True):
        of_source = sum(n for name, n in shares.items() if name[0] == part.name)
        assert count / served[part.name] == pytest.approx(len(part) / of_source, rel=0.02)


def test_runs_on_two_ranks_and_resumed_runs_train_on_the_same_images(root, tmp_path):
    straight = fit(tmp_path / "straight", module(root), 6, stage=Images)
    two = fit(tmp_path / "two", module(root, micro_batch=2), 6, devices=2, stage=Images)
    assert {step: sorted(keys) for step, (keys, _) in two.items()} == {
        step: sorted(keys) for step, (keys, _) in straight.items()
    }
    fit(tmp_path / "start", module(root), 6, stop_at=3, stage=Images)
    checkpoint = tmp_path / "start" / "stopped.ckpt"
    rest = fit(tmp_path / "rest", module(root, micro_batch=4, workers=1), 6, ckpt=checkpoint, stage=Images)
    assert rest == {step: straight[step] for step in range(3, 6)}
    with pytest.raises(ConfigError, match=r"data\.buckets=\[\[24, 12\].*this run has \[\[20, 12\]"):
        changed = AspectBucketsConfig(1.7, 4)
        fit(tmp_path / "other", module(root, buckets=changed), 6, ckpt=checkpoint, stage=Images)


def test_validation_reads_every_image_once_in_batches_of_one_bucket(root):
    data = module(root, micro_batch=4)
    keys, seen = [], Counter()
    for batch in validation(data):
        keys += batch["keys"]
        seen[tuple(batch["pixel_values"].shape[2:])] += len(batch["keys"])
    assert len(keys) == 91 and len(set(keys)) == 90, "one of them replaces the cut one"
    assert seen == bucket_sizes(data.val_sources)
    sizes = tuple(bucket_sizes(data.val_sources).values())
    cuts = [BucketPass(sizes, 4, 2, rank) for rank in range(2)]
    positions = sorted(p for cut in cuts for m in range(len(cut)) for p in cut.positions(m))
    assert len(cuts[0]) == len(cuts[1]) and len(positions) == len(set(positions)) == 91 - cuts[0].dropped
    assert cuts[0].dropped == sum(size % 2 for size in sizes)
    few: list[dict[str, Any]] = list(data.spread(10))
    assert {tuple(batch["pixel_values"].shape[2:]) for batch in few} == set(seen)
    with pytest.raises(IndexError):
        cuts[0].positions(len(cuts[0]))


def test_the_reports_count_buckets_and_what_they_cut_off(root):
    data = module(root)
    report = DataReport(1, 10)
    for batch in validation(data):
        report.add(batch)
    summary = report.summary()
    assert {name: row["seen"] for name, row in summary["buckets"].items()} == {
        shape_name(shape): size for shape, size in bucket_sizes(data.val_sources).items()
    }
    assert summary["sources"]["b"]["replaced"] == 1 and not any("cropped" in name for name in summary["sources"]["a"])
    held = stats(ShardIndex.open(root / "a"), data.collate.image)
    assert held["buckets"]["16x16"] == 30 and sum(held["buckets"].values()) == 70 and "tiles" not in held
    assert held["cropped"]["16x16"] == pytest.approx((1 - 30 / 33) / 3, abs=1e-4)
    alone = DataReport(1, 10)
    for batch in validation(module(root, val=sources(root / "a"))):
        alone.add(batch)
    rows = alone.summary()["buckets"]
    assert {name: row["cropped"] for name, row in rows.items()} == pytest.approx(held["cropped"], abs=1e-4)
    part = stats(ShardIndex.open(root / "a"), data.collate.image, range(7))
    assert sum(part["buckets"].values()) == pytest.approx(70, abs=3) and {"buckets", "cropped"} <= set(
        part["estimated"]
    )
    assert "buckets" not in stats(ShardIndex.open(root / "a"), ImageSpec(16, "crop"))


def test_small_buckets_are_told(root):
    parts = module(root).train_sources
    sentence = small_buckets(parts, 20)
    assert sentence is not None and "4 of 5 buckets have fewer images than data.global_batch=20" in sentence
    assert small_buckets(parts, 5) is None
