"""What ranks write together, any number of ranks reads; a failing disk or a kill leaves the checkpoint before it."""

import copy
import errno
import gc
import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import ProcessExitedException

from mmlab.config.errors import RunError
from mmlab.data.module import ShardDataModule
from mmlab.training import checkpoint_folder
from mmlab.training import checkpoint_io as io
from mmlab.training.config import BatchLogConfig, EMAConfig, FSDPConfig, PostHocEMAConfig
from mmlab.training.ema import EMA
from mmlab.training.posthoc_ema import PostHocEMA
from mmlab.training.resume_proof import BatchLog, difference, read_batches
from mmlab.training.sharded_checkpoint import like, restore_module, restore_optimizer
from mmlab.training.sharding import ShardedStrategy
from mmlab.weights import local
from tests.tiny_ranks import private_memory, ranks
from tests.tiny_shards import make_shards, settings, sources
from tests.tiny_trainer import Keys, Kill, KillAt, run

STEPS = 12
MANY = 20_000_000
"""Numbers of a tensor that is large against the noise of a process's memory."""


class Net(nn.Module):
    """Rows that no number of ranks divides, fewer rows than ranks, tied weights, a number, a buffer, two dtypes."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(10, 5), nn.Linear(5, 10)
        self.head.weight = self.embed.weight
        self.inner = nn.Linear(5, 7).bfloat16()
        self.row = nn.Parameter(torch.randn(1, 3))
        self.temperature = nn.Parameter(torch.randn(()))
        self.register_buffer("seen", torch.randn(6))


def made(seed: int, sharded: bool) -> tuple[Net, torch.optim.AdamW]:
    """A model and its optimizer after a step."""
    net = Net(seed)
    if sharded:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        fully_shard(net, mesh=mesh, ignored_params={net.temperature})
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, foreach=False)
    for parameter in net.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return net, optimizer


def state_of(net: Net, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    average = {name: weight.detach().float() * 2 for name, weight in net.named_parameters()}
    return {
        "state_dict": net.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {"EMA": {"updates": 1, "average": average}},
        "rng": [(3, (1, 2), None)],
    }


def restored(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a sharded model with other values, into which a checkpoint was read."""
    net, optimizer = made(seed=1, sharded=True)
    restore_module(net, state["state_dict"], strict=True)
    restore_optimizer(optimizer, state["optimizer_states"][0])
    stored = state["callbacks"]["EMA"]["average"]
    average = {name: like(weight, stored[name]) for name, weight in net.named_parameters()}
    return state_of(net, optimizer) | {"callbacks": {"EMA": {"updates": 1, "average": average}}}


def save(folder: Path, state: dict[str, Any]) -> io.FolderCheckpointIO:
    writer = io.FolderCheckpointIO()
    writer.save_sharded(state, folder)
    return writer


def two_ranks(rank: int, folder: Path) -> None:
    first = state_of(*made(0, sharded=True))
    assert save(folder / "two" / "step-1", first).fault is None
    assert save(folder / "two" / "step-1", first).fault is None, "the same again"
    save(folder / "again" / "step-1", restored(io.read_mapped(folder / "two" / "step-1")))

    # One rank's disk is full.
    write, seen = io.write_rows, []
    if rank == 1:
        io.write_rows = fail
    writer = save(folder / "two" / "step-2", first)
    seen.append((writer.fault, sorted(path.name for path in (folder / "two").iterdir())))
    io.write_rows = write
    torch.distributed.barrier()
    # The first rank's is, when all the others are done.
    replace = io._replace
    io._replace = fail
    writer.save_sharded(first, folder / "two" / "step-2")
    seen.append((writer.fault, sorted(path.name for path in (folder / "two").iterdir())))
    io._replace = replace
    torch.distributed.barrier()
    writer.save_sharded(first, folder / "two" / "step-3")
    (folder / f"faults-{rank}.json").write_text(json.dumps([*seen, writer.fault]))

    # Nothing whole is held.
    (folder / f"memory-{rank}.json").write_text(json.dumps(measure(folder / "large")))


def fail(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def measure(folder: Path) -> list[float]:
    """Growth of a rank's own memory by a large tensor that is read from all ranks' files, and from a whole one."""
    mesh = init_device_mesh("cpu", (2,))
    large = nn.Linear(MANY // 1000, 1000, bias=False)
    fully_shard(large, mesh=mesh)
    save(folder / "step-1", {"x": large.weight})
    whole = folder / "step-2"
    if torch.distributed.get_rank() == 0:
        whole.mkdir()
        io.write(io.read(folder / "step-1"), whole)
    torch.distributed.barrier()
    # Memory of an earlier step may be freed while one is measured, which then seems to take less.
    return [max(growth(path, large.weight) for _ in range(3)) for path in (folder / "step-1", whole)]


def growth(path: Path, weight: torch.Tensor) -> float:
    """What one reading adds to a rank's own memory, relative to the tensor."""
    gc.collect()
    before = private_memory()
    state = copy.deepcopy(io.read_mapped(path))  # as Lightning copies the state of callbacks
    kept = like(weight, state["x"])
    growth = (private_memory() - before) / (4 * MANY)
    assert torch.equal(local(kept), local(weight.detach()))
    return growth


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    ranks(2, two_ranks, folder)
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return state_of(*made(0, sharded=False))


def test_the_ranks_files_are_the_whole_state(folder, expected):
    path = folder / "two" / "step-1"
    assert checkpoint_folder.find_fault(path) is None
    assert difference(io.read(path), expected) is None
    assert sorted(file.name for file in path.iterdir()) == [
        checkpoint_folder.MANIFEST,
        "shard-0-of-2.safetensors",
        "shard-1-of-2.safetensors",
        checkpoint_folder.STATE,
    ]


def test_each_rank_writes_its_rows_and_tied_weights_once(folder):
    files = [load_file(folder / "two" / "step-1" / f"shard-{rank}-of-2.safetensors") for rank in (0, 1)]
    shapes = [tuple(file["state_dict/inner.weight"].shape) for file in files]
    assert shapes == [(4, 5), (3, 5)]
    assert files[0]["optimizer_states/0/state/4/exp_avg"].dtype == torch.bfloat16
    assert [name for name in files[0].keys() ^ files[1].keys() if "state_dict" in name] == ["state_dict/row"], (
        "one row, on one rank"
    )
    assert "state_dict/embed.weight" in files[0] and "state_dict/head.weight" not in files[0]
    assert not any("temperature" in name or "seen" in name or "step" in name for name in files[0])


@pytest.mark.parametrize("count", [1, 3, 4])
def test_another_number_of_ranks_reads_it(folder, tmp_path, expected, count):
    ranks(count, reread, tmp_path, folder / "two" / "step-1")
    assert difference(io.read(tmp_path / "step-2"), expected) is None
    assert len(list((tmp_path / "step-2").glob("shard-*"))) == count


def reread(rank: int, folder: Path, path: Path) -> None:
    state = restored(io.read_mapped(path))
    if rank == 0:
        checkpoint_folder.remove(path.with_name("none"))
    save(folder / "step-2", state)


def test_the_same_number_of_ranks_reads_it(folder, expected):
    assert difference(io.read(folder / "again" / "step-1"), expected) is None


def test_ranks_read_a_state_that_was_not_sharded(tmp_path, expected):
    whole = tmp_path / "step-1"
    io.FolderCheckpointIO().save_checkpoint(expected, whole)
    assert not list(whole.glob("shard-*"))
    ranks(2, reread, tmp_path, whole)
    assert difference(io.read(tmp_path / "step-2"), expected) is None


def test_no_rank_reads_more_than_its_share(folder):
    for rank in (0, 1):
        sharded, whole = json.loads((folder / f"memory-{rank}.json").read_text())
        assert 0.45 < sharded < 0.6 and 0.45 < whole < 0.6


def test_a_full_disk_of_one_rank_is_a_fault_for_all(folder):
    faults = [json.loads((folder / f"faults-{rank}.json").read_text()) for rank in (0, 1)]
    assert faults[0] == faults[1]
    (first, left), (second, left_again), last = faults[0]
    assert "step-2 could not be written (No space left on device on rank 1); earlier" in first
    assert "step-2 could not be written (No space left on device); earlier" in second
    assert left == left_again == ["step-1"] and last is None
    assert checkpoint_folder.newest_whole(folder / "two", pytest.fail) == folder / "two" / "step-3"


def test_a_missing_or_damaged_shard_is_named_and_the_one_before_is_taken(folder, tmp_path):
    for step in (1, 3):
        (tmp_path / f"step-{step}").symlink_to(folder / "two" / f"step-{step}")
    shard = folder / "two" / "step-3" / "shard-1-of-2.safetensors"
    data, seen = shard.read_bytes(), []
    for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), None):
        if damaged is None:
            shard.unlink()
        else:
            shard.write_bytes(damaged)
        assert checkpoint_folder.newest_whole(tmp_path, seen.append) == tmp_path / "step-1"
    shard.write_bytes(data)
    assert [said.split("is damaged: ")[1] for said in seen] == [
        f"shard-1-of-2.safetensors has {len(data) - 1} bytes instead of {len(data)}",
        "the contents of shard-1-of-2.safetensors have changed",
        "shard-1-of-2.safetensors is missing",
    ]


def test_rows_that_no_file_has_are_not_made_up(folder, tmp_path):
    path = folder / "two" / "step-1"
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((path / checkpoint_folder.MANIFEST).read_text())
    del manifest["files"]["shard-1-of-2.safetensors"]
    (tmp_path / checkpoint_folder.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"lacks rows of state_dict/embed\.weight: row 5 of 10 is missing"):
        io.read(tmp_path)


POINTS = {"in its rows": (1, "write_rows"), "before the manifest": (0, "_write_manifest"), "rename": (0, "_replace")}


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_of_one_rank_leaves_the_checkpoint_before(folder, tmp_path, point):
    (tmp_path / "step-1").symlink_to(folder / "two" / "step-1")
    with pytest.raises(ProcessExitedException):
        ranks(2, killed, tmp_path, *POINTS[point])
    assert checkpoint_folder.newest_whole(tmp_path, pytest.fail) == tmp_path / "step-1"
    assert len(list(tmp_path.glob(".draft-*"))) == 1
    checkpoint_folder.remove_drafts(tmp_path)
    assert not list(tmp_path.glob(".*"))


def killed(rank: int, folder: Path, which: int, function: str) -> None:
    if rank == which:
        setattr(io, function, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    save(folder / "step-2", state_of(*made(0, sharded=True)))


class Line(L.LightningModule):
    """A model of one part, which a strategy may shard."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(1, 7), nn.GELU(), nn.Linear(7, 1))})

    def configure_model(self) -> None:
        if isinstance(strategy := self.trainer.strategy, ShardedStrategy):
            strategy.shard(self.model, [], lambda part, weight: weight.dtype)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        x = batch["x"] / 97
        loss = (self.model["net"](x) - x.sin()).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def train(shards: Path, folder: Path, end: int | None = None, sharded: bool = False) -> None:
    """Resume the run in `folder`, or start it, and kill it at a micro-batch of a rank."""
    folder.mkdir(exist_ok=True)
    callbacks = [
        EMA(EMAConfig()),
        PostHocEMA(PostHocEMAConfig(snapshots=6)),
        BatchLog(BatchLogConfig(folder=str(folder))),
    ]
    options: dict[str, Any] = {"default_root_dir": folder}
    if sharded:
        strategy = ShardedStrategy(FSDPConfig())
        options |= {"devices": torch.distributed.get_world_size(), "strategy": strategy}
    data = ShardDataModule(settings(train=sources(shards), micro_batch=2), Keys())
    kill = [] if end is None else [KillAt("start", end)]
    with nullcontext() if end is None else pytest.raises(Kill):
        run(Line(), data, folder, STEPS, [*callbacks, *kill], **options)


def two_ranks_resume(rank: int, folder: Path, shards: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # for Lightning: the ranks are there
    train(shards, folder / "whole first", 2 * 6, sharded=True)
    newest = next(iter(checkpoint_folder.steps(folder / "whole first" / "checkpoints").values()))
    torch.distributed.barrier()
    if rank == 0:
        shard = newest / "shard-1-of-2.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    torch.distributed.barrier()
    train(shards, folder / "whole first", 2 * 8, sharded=True)  # from the one before, on both ranks
    train(shards, folder / "sharded first", 2 * 5, sharded=True)


def test_a_run_goes_on_under_another_strategy_with_another_number_of_ranks(tmp_path):
    shards = tmp_path / "shards"
    make_shards(shards, 21)
    train(shards, tmp_path / "straight")
    train(shards, tmp_path / "whole first", 4 * 4)
    ranks(2, two_ranks_resume, tmp_path, shards)
    last = f"checkpoints/step-{STEPS}"
    expected, batches = io.read(tmp_path / "straight" / last), read_batches(tmp_path / "straight")[0]
    for name in ("whole first", "sharded first"):
        saved = checkpoint_folder.steps(tmp_path / name / "checkpoints")
        assert next(iter(saved.values())).joinpath("shard-1-of-2.safetensors").is_file()
        train(shards, tmp_path / name)
        state = io.read(tmp_path / name / last)
        for key in ("state_dict", "optimizer_states", "callbacks"):
            torch.testing.assert_close(state[key], expected[key], rtol=1e-5, atol=1e-6)
        snapshots = [
            {path.name: load_file(path) for path in (tmp_path / run / "ema").iterdir()} for run in (name, "straight")
        ]
        torch.testing.assert_close(*snapshots, rtol=1e-3, atol=1e-4)
        assert "step-2.safetensors" in snapshots[0], "written by two ranks in the last of the runs"
        again = read_batches(tmp_path / name)[0]
        assert {step: set(keys) for step, keys in again.items()} == {step: set(keys) for step, keys in batches.items()}


def test_a_sharded_run_steps_in_its_own_way_after_a_run_on_one_cpu():
    here, there = Net(0), Net(0)
    optimizer = torch.optim.AdamW(here.parameters(), lr=0.1, foreach=False)
    fused = torch.optim.AdamW(there.parameters(), lr=0.2, fused=True)
    restore_optimizer(optimizer, fused.state_dict())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["foreach"], group["fused"]) == (0.2, False, None)
