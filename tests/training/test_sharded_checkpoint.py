"""What ranks write together, any number of ranks reads; a failing disk or a kill leaves the checkpoint before it."""

import errno
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import ProcessExitedException

from mmlab.config.errors import RunError
from mmlab.training import checkpoint_io as io
from mmlab.training.resume_proof import difference
from mmlab.training.sharded_checkpoint import like, restore_module, restore_optimizer
from mmlab.weights import local

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


def ranks(count: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> None:
    """Fork ranks that call `work(rank, folder, *arguments)` with a process group."""
    store = folder / f"store-{os.urandom(4).hex()}"
    mp.start_processes(_rank, (count, store, work, folder, arguments), nprocs=count, start_method="fork")  # type: ignore[attr-defined]


def _rank(rank: int, count: int, store: Path, work: Callable[..., Any], folder: Path, arguments: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=count)
    work(rank, folder, *arguments)
    torch.distributed.destroy_process_group()


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
    """Growth of a rank's own memory, relative to a large tensor: reading from all ranks, and from a whole state."""
    mesh = init_device_mesh("cpu", (2,))
    large = nn.Linear(MANY // 1000, 1000, bias=False)
    fully_shard(large, mesh=mesh)
    save(folder / "step-1", {"x": large.weight})
    whole = folder / "step-2"
    if torch.distributed.get_rank() == 0:
        whole.mkdir()
        io.write(io.read(folder / "step-1"), whole)
    torch.distributed.barrier()
    growths = []
    for path in (folder / "step-1", whole):
        before = private_memory()
        kept = like(large.weight, io.read_mapped(path)["x"])
        growths.append((private_memory() - before) / (4 * MANY))
        assert torch.equal(local(kept), local(large.weight.detach()))
        del kept
    return growths


def private_memory() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


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
    assert io.find_fault(path) is None
    assert difference(io.read(path), expected) is None
    assert sorted(file.name for file in path.iterdir()) == [
        io.MANIFEST,
        "shard-0-of-2.safetensors",
        "shard-1-of-2.safetensors",
        io.STATE,
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
        io.remove(path.with_name("none"))
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
    assert io.newest_whole(folder / "two", pytest.fail) == folder / "two" / "step-3"


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
        assert io.newest_whole(tmp_path, seen.append) == tmp_path / "step-1"
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
    manifest = json.loads((path / io.MANIFEST).read_text())
    del manifest["files"]["shard-1-of-2.safetensors"]
    (tmp_path / io.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"not all rows of state_dict/embed\.weight: row 5 of 10 is missing"):
        io.read(tmp_path)


POINTS = {"in its rows": (1, "write_rows"), "before the manifest": (0, "_write_manifest"), "rename": (0, "_replace")}


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_of_one_rank_leaves_the_checkpoint_before(folder, tmp_path, point):
    (tmp_path / "step-1").symlink_to(folder / "two" / "step-1")
    with pytest.raises(ProcessExitedException):
        ranks(2, killed, tmp_path, *POINTS[point])
    assert io.newest_whole(tmp_path, pytest.fail) == tmp_path / "step-1"
    assert len(list(tmp_path.glob(".draft-*"))) == 1
    io.remove_drafts(tmp_path)
    assert not list(tmp_path.glob(".*"))


def killed(rank: int, folder: Path, which: int, function: str) -> None:
    if rank == which:
        setattr(io, function, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    save(folder / "step-2", state_of(*made(0, sharded=True)))
