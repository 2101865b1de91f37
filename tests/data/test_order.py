import numpy as np
import pytest

from mmlab.config.errors import ConfigError
from mmlab.data.order import EpochOrder, replacement, sample_seed, source_seed
from tests.tiny_shards import settings


def whole(order: EpochOrder, epoch: int) -> list[int]:
    return [order.sample(epoch, position) for position in range(order.size)]


def test_the_order_never_changes():
    """These numbers are a promise to every run ever started: a change here is a change of their data."""
    order = EpochOrder([3, 2, 4, 1], seed=7, block_shards=2)
    assert whole(order, 0) == [4, 3, 9, 7, 0, 8, 2, 5, 6, 1]
    assert whole(order, 1) == [8, 5, 6, 7, 1, 0, 2, 3, 9, 4]
    assert sample_seed(7, 1, 2, "coco") == 3939986585401318877
    assert source_seed(7, "coco") == 18344092389086422431
    assert replacement(7, 1, 2, "coco", 1, 1000) == 748


@pytest.mark.parametrize("sizes", [[1], [5], [3, 2, 4, 1], [4] * 20, [0, 3, 0, 2]])
@pytest.mark.parametrize("block_shards", [1, 3, 100])
def test_each_epoch_shows_each_sample_once(sizes, block_shards):
    order = EpochOrder(sizes, seed=1, block_shards=block_shards)
    for epoch in (0, 1, 5):
        assert sorted(whole(order, epoch)) == list(range(sum(sizes)))


def test_epochs_and_seeds_differ():
    orders = [whole(EpochOrder([10] * 5, seed, 8), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_access_in_any_sequence_gives_the_same_order():
    straight = whole(EpochOrder([4] * 9, seed=3, block_shards=2), 0)
    order = EpochOrder([4] * 9, seed=3, block_shards=2)
    for position in np.random.default_rng(0).permutation(36):
        order.sample(1, int(position))
        assert order.sample(0, int(position)) == straight[position]


def test_samples_stay_within_blocks_of_shards():
    order = EpochOrder([10] * 12, seed=0, block_shards=3)
    samples = np.array(whole(order, 0)).reshape(4, 30)
    assert all(len(np.unique(block // 10)) == 3 for block in samples)
    assert any(len(np.unique(block[:10] // 10)) > 1 for block in samples), "shards of a block are mixed"


def test_without_shuffle_samples_keep_their_order():
    assert whole(EpochOrder([3, 2], 0, 8, shuffle=False), 4) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shuffle", [True, False])
def test_blocks_hold_the_shards_of_their_positions(shuffle):
    sizes = [3, 2, 0, 4, 1, 5]
    order, shard_of = EpochOrder(sizes, 7, 2, shuffle), np.repeat(np.arange(6), sizes)
    for epoch in (1, 2):
        blocks = list(order.blocks(epoch))
        assert sorted(s for block in blocks for s in block) == [0, 1, 3, 4, 5] and blocks[1:] == list(
            order.blocks(epoch, 1)
        )
        for position in range(order.size):
            _, number = order.block(epoch, position)
            assert shard_of[order.sample(epoch, position)] in blocks[number]
            assert shuffle or len(blocks[number]) == 1, "only the shard that is read"


def test_impossible_orders_are_refused():
    with pytest.raises(ConfigError, match="'block_shards' must be above 0"):
        settings(block_shards=0)
    with pytest.raises(ConfigError, match="at least one sample"):
        EpochOrder([0, 0], 0, 8)
    with pytest.raises(ConfigError, match="seed=-1"):
        EpochOrder([1], -1, 8).sample(0, 0)
    with pytest.raises(IndexError):
        EpochOrder([2], 0, 8).sample(0, 2)


def test_sample_seeds_are_distinct_and_fit_int64():
    seeds = {sample_seed(s, e, p, n) for s in (0, 1) for e in (0, 1) for p in range(50) for n in ("a", "b")}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, 256, 0, "a") != sample_seed(256, 0, 0, "a")
