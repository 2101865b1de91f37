"""LLaVA 13B on many simulated ranks: what each has, and the most it has while the model is sharded."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmlab.config.build import build
from mmlab.config.compose import compose
from mmlab.model.blocks import blocks
from mmlab.stage.assembly import build_around
from mmlab.training.config import FSDPConfig
from mmlab.training.live_memory import LiveMemory
from mmlab.training.sharding import inside
from mmlab.training.trainable import parts_of
from mmlab.weights import is_sharded, local
from tests.tiny_ranks import strategy_here


class New(LiveMemory):
    """Does not count weights that are mapped from files."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.mapped = {id(storage): storage for w in model.parameters() if (storage := w.untyped_storage())}

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self.mapped:
            super()._count(storage)


@cache
def built(experiment: str) -> Any:
    """A stage whose weights are stored in fp16, as Vicuna's are."""
    cfg = compose("train", [f"experiment={experiment}"])
    with torch.device("meta"):
        model = build(cfg.model).half()
    return build_around(model, cfg)


@contextmanager
def one_of(world: int, rank: int) -> Iterator[None]:
    distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("experiment", "world", "rank"),
    [
        ("llava/v1_13b_finetune", 64, 0),
        ("llava/v1_13b_finetune", 64, 31),
        ("llava/v1_13b_finetune", 64, 63),
        ("llava/v1_13b_finetune", 48, 47),  # uneven: the last rank has fewer rows
        ("llava/v15_13b_finetune", 64, 63),
    ],
)
def test_a_rank_has_its_share_and_one_group(experiment, world, rank):
    stage = built(experiment)
    model, dtype = deepcopy(stage.model), stage.dtypes("bf16-mixed")
    layers, left, sizes = blocks(model), set(model.parameters()), []
    for name, part in parts_of(model).items():
        for unit in [*inside(part, layers), part]:
            own = left & set(unit.parameters())
            sizes.append(sum(weight.numel() * dtype(name, weight).itemsize for weight in own))
            left -= own
    assert len(sizes) > 60
    del left, own, unit, part
    with one_of(world, rank), New(model) as memory:
        strategy_here(FSDPConfig()).shard(model, layers, dtype)
        weights = list(model.parameters())
        whole = sum(weight.nbytes for weight in weights if not is_sharded(weight))
        share = sum(local(weight).nbytes for weight in weights if is_sharded(weight))
        assert whole == sum(weight.nbytes for weight in model.vision.parameters()) < sum(sizes) / 80
        assert 0.85 * (sum(sizes) - whole) / world <= share <= 1.05 * sum(sizes) / world
        assert memory.now <= whole + 1.05 * sum(sizes) / world, "the last rank's rows are padded"
        assert memory.peak <= whole + 1.05 * (sum(sizes) / world + max(sizes))
