"""What two ranks leave behind is what one process would have left."""

import errno
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from mmlab.config.errors import RunError
from mmlab.training import gathering
from mmlab.training.artifacts import describe, describe_base, save_parts
from mmlab.training.config import LoRAConfig
from mmlab.training.gathering import gather
from mmlab.training.lora import add_adapters
from mmlab.training.trainable import set_trainable
from mmlab.weights import is_sharded
from tests.model import tiny
from tests.tiny_ranks import private_memory, ranks, shard

CASES = ["whole", "tied", "bf16", "adapter"]
MANY = 10_000_000
"""Numbers of a weight so large that its memory is returned as soon as it is free."""


def case(name: str, tokenizer: Path) -> tuple[Any, Sequence[str], dict[str, Any]]:
    """A model, the parts that are saved (a frozen one, too), and what those with an adapter were before."""
    model: Any = tiny.vlm(tokenizer, tongue="gpt2" if name == "tied" else "llama")
    if name == "bf16":
        model.to(torch.bfloat16)
    set_trainable(model, ["connector", "language"], ["language"] if name == "adapter" else [])
    if name != "adapter":
        return model, ["connector", "language", "vision"], {}
    bases = describe_base(model, ["language"], {})
    add_adapters(model, {"language": LoRAConfig(rank=4, alpha=8)})
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight))
    return model, ["connector", "language"], bases


class Large(nn.Module):
    """A part of five large weights, each in a layer of its own."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(*(nn.Linear(MANY // 1000, 1000, bias=False) for _ in range(5)))


def two_ranks(rank: int, folder: Path, tokenizer: Path) -> None:
    for name in CASES:
        model, names, bases = case(name, tokenizer)
        against = {"vision": describe(model.vision)}
        if rank == 0:
            save_parts(model, names, folder / name / "before", {}, against, bases)
        shard(model)
        assert all(is_sharded(weight) for weight in model.parameters())
        gather(model, names, bases, folder)
        if rank == 0:
            save_parts(model, names, folder / name / "after", {}, against, bases)
            kept = isinstance(model.vision, FSDPModule)
            (folder / name / "classes.json").write_text(json.dumps([kept, isinstance(model.language, FSDPModule)]))

    large = Large()
    shard(large)
    before = private_memory()
    gather(large, ["part"], [], folder)
    (folder / f"memory-{rank}.json").write_text(json.dumps(growth(before)))

    gathering._append = full
    model, names, _ = case("whole", tokenizer)
    shard(model)
    if rank > 0:
        gather(model, names, [], folder)
        return
    with pytest.raises(RunError, match="artifacts cannot be written: the disk is full"):
        gather(model, names, [], folder)
    (folder / "full").mkdir()


def growth(before: int) -> float:
    """The memory since then in weights; torch's threads free what they received a moment after the last one."""
    for _ in range(100):
        weights = (private_memory() - before) / (4 * MANY)
        if weights < 1.5:
            break
        time.sleep(0.1)
    return weights


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_folder) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    ranks(2, two_ranks, folder, tokenizer_folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_artifacts_have_the_same_bytes(folder, name):
    before, after = folder / name / "before", folder / name / "after"
    files = sorted(path.relative_to(before) for path in before.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(after) for path in after.rglob("*") if path.is_file())
    assert len(files) > 3
    for file in files:
        assert (before / file).read_bytes() == (after / file).read_bytes(), file


def test_parts_that_are_not_saved_stay_sharded(folder):
    assert json.loads((folder / "adapter" / "classes.json").read_text()) == [True, False]
    assert json.loads((folder / "whole" / "classes.json").read_text()) == [False, False]


def test_whole_weights_take_no_memory(folder):
    growths = [json.loads((folder / f"memory-{rank}.json").read_text()) for rank in range(2)]
    assert max(growths) < 1.5, "of five weights"


def test_a_full_disk_is_an_error_of_the_first_rank_alone(folder):
    assert (folder / "full").is_dir()
