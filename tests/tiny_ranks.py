"""Forked processes, alone or with a process group, and models that are sharded over them."""

import ctypes
import faulthandler
import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from mmlab.model.blocks import blocks
from mmlab.training.config import FSDPConfig
from mmlab.training.sharding import ShardedStrategy


def forked(work: Callable[[], Any]) -> int:
    """Call `work` in a fork, which has all imports done; returns its exit code, which is negative after a signal."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def private_memory() -> int:
    """Bytes of this process's own memory, counted page by page: the kernel's running counters lag behind.

    Free memory that malloc keeps, which in a fork may be the parent's, is given back first: what is put there would not
    count as growth.
    """
    ctypes.CDLL(None).malloc_trim(0)
    found = re.search(r"^Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def ranks(
    count: int, work: Callable[..., Any], folder: Path, *arguments: Any, meanwhile: Callable[[], Any] = lambda: None
) -> None:
    """Fork ranks that call `work(rank, folder, *arguments)` with a process group."""
    options = (count, folder / f"store-{os.urandom(4).hex()}", work, folder, arguments)
    forked: Any = mp.start_processes(_rank, options, nprocs=count, join=False, start_method="fork")  # type: ignore[attr-defined]
    meanwhile()
    while not forked.join():
        pass


def _rank(rank: int, count: int, store: Path, work: Callable[..., Any], folder: Path, arguments: Any) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(300, exit=True)  # what not all ranks call together hangs
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=count)
    work(rank, folder, *arguments)
    torch.distributed.barrier()  # a rank that has left may take with it what another has not received
    torch.distributed.destroy_process_group()


def strategy_here(config: FSDPConfig) -> ShardedStrategy:
    """Our strategy over all ranks of the process group, without a trainer."""
    strategy, names = ShardedStrategy(config), ("data_parallel", "tensor_parallel")
    strategy._device_mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(), 1), mesh_dim_names=names)
    return strategy


def shard(model: nn.Module) -> None:
    """Shard all parts of a model, in their dtypes."""
    strategy_here(FSDPConfig(whole_below=0)).shard(model, blocks(model), lambda part, weight: weight.dtype)
