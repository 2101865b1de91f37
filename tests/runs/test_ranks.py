"""Number of processes, gradient accumulation, and checks of devices and SLURM tasks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from mmlab.config.errors import ConfigError, RunError
from mmlab.runs.ranks import accumulation, check_devices, check_tasks, connected_ranks, under_srun, world_size
from mmlab.training.config import TrainerConfig
from tests.tiny_ranks import ranks


def test_accumulation_fills_the_global_batch():
    assert accumulation(128, 32, 1) == 4
    assert accumulation(128, 32, 4) == 1
    assert accumulation(8, 1, 2) == 4


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        ((128, 48, 1), "micro_batch=64"),  # of 32 and 64, which are equally near, the larger
        ((128, 64, 4), "micro_batch=32"),
        ((100, 30, 2), "micro_batch=25"),
        ((130, 32, 4), "global_batch=128 or 132"),
        ((3, 1, 4), "global_batch=4"),
        ((0, 1, 1), "global_batch=0"),
        ((8, 0, 1), "micro_batch=0"),
    ],
)
def test_an_indivisible_batch_is_refused_with_the_nearest_valid_one(batches, error):
    with pytest.raises(ConfigError, match=error):
        accumulation(*batches)


def trainer(**changes) -> DictConfig:
    merged = OmegaConf.merge(OmegaConf.structured(TrainerConfig), changes)
    assert isinstance(merged, DictConfig)
    return merged


@pytest.mark.parametrize(
    ("gpus", "changes", "ranks"),
    [
        (0, {"devices": 2, "num_nodes": 3}, 6),
        (0, {"devices": [0, 1]}, 2),
        (4, {"devices": "auto", "accelerator": "cpu", "num_nodes": 2}, 2),
        (4, {"devices": -1, "accelerator": "cpu"}, 1),
        (4, {"devices": -1, "accelerator": "mps"}, 1),
        (4, {"devices": -1, "accelerator": "gpu", "num_nodes": 2}, 8),
        (4, {"devices": "auto"}, 4),
        (0, {"devices": "auto"}, 1),
    ],
)
def test_world_size(monkeypatch, gpus, changes, ranks):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert world_size(trainer(**changes)) == ranks


@pytest.fixture
def machine(monkeypatch):
    """Set the number of GPUs that torch finds, and whether mps is available."""

    def has(gpus: int, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    return has


@pytest.mark.parametrize(
    ("gpus", "mps", "changes"),
    [
        (0, False, {"devices": 3}),
        (0, False, {"devices": "auto"}),
        (0, True, {"accelerator": "gpu"}),
        (2, False, {"accelerator": "gpu", "devices": [1]}),
        (2, False, {"accelerator": "cuda", "devices": 2, "num_nodes": 4}),
        (2, False, {"accelerator": "cpu", "devices": 3}),
        (2, False, {"devices": -1}),
    ],
)
def test_existing_devices_pass(machine, gpus, mps, changes):
    machine(gpus, mps)
    check_devices(trainer(**changes))


@pytest.mark.parametrize(
    ("gpus", "mps", "changes", "sentence"),
    [
        (0, False, {"accelerator": "gpu"}, "trainer.accelerator=gpu, but this machine has no GPU that torch can use"),
        (0, True, {"accelerator": "cuda", "devices": "auto"}, "trainer.accelerator=cuda, but this machine has no GPU"),
        (
            1,
            False,
            {"accelerator": "mps"},
            "this machine has no mps; give trainer.accelerator=cpu",
        ),
        (0, False, {"devices": [0]}, r"trainer.devices=\[0\] names GPUs; on a CPU give their number"),
        (1, False, {"devices": 2}, "trainer.devices=2, but torch finds 1 GPU; trainer.devices=auto"),
        (2, False, {"devices": [0, 2]}, r"trainer.devices=\[0, 2\], but torch finds 2 GPUs, 0 to 1;"),
        (0, True, {"devices": 2}, "trainer.devices=2, but torch finds 1 GPU"),
    ],
)
def test_missing_devices_are_refused(machine, gpus, mps, changes, sentence):
    machine(gpus, mps)
    with pytest.raises(ConfigError, match=sentence):
        check_devices(trainer(**changes))


def test_torchrun_may_show_each_process_one_gpu(machine, monkeypatch):
    machine(1, False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    check_devices(trainer(devices=8))


@pytest.fixture
def srun(monkeypatch):
    """Pretend to be a task of a SLURM step; without arguments, a batch script."""

    def become(tasks: int | None = None, nodes: int = 1, per_node: int | None = None, name: str = "train") -> None:
        step = {} if tasks is None else {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_NUM_NODES": nodes}
        more = {"SLURM_NTASKS_PER_NODE": per_node} if per_node else {}
        for key, value in {"SLURM_JOB_ID": 7, "SLURM_JOB_NAME": name, **step, **more}.items():
            monkeypatch.setenv(key, str(value))

    for key in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_NTASKS_PER_NODE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(key, raising=False)
    return become


def test_matching_tasks_pass(srun):
    srun(tasks=8, nodes=2, per_node=4)
    assert under_srun()
    check_tasks(devices=4, nodes=2)


@pytest.mark.parametrize(
    ("tasks", "devices", "nodes", "sentence"),
    [
        (2, 1, 1, "started 2 tasks on 1 node, but trainer.devices is 1 .* give trainer.devices=2 trainer.num_nodes=1"),
        (1, 8, 1, "started 1 task on 1 node, but trainer.devices is 8 .* submit with --nodes=1 --ntasks-per-node=8"),
        (4, 4, 2, "started 4 tasks on 1 node, .*num_nodes is 2"),
    ],
)
def test_mismatched_tasks_are_refused(srun, tasks, devices, nodes, sentence):
    srun(tasks=tasks, per_node=tasks)
    with pytest.raises(ConfigError, match=sentence):
        check_tasks(devices, nodes)


def test_tasks_must_be_given_per_node(srun):
    srun(tasks=2)
    with pytest.raises(ConfigError, match="--ntasks-per-node=2 instead of --ntasks"):
        check_tasks(devices=2, nodes=1)


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_an_interactive_shell_is_no_rank(srun, name):
    srun(tasks=1, name=name)
    assert not under_srun()
    check_tasks(devices=8, nodes=1)


def test_a_batch_script_and_torchrun_start_ranks_themselves(srun, monkeypatch):
    srun()
    assert not under_srun()
    check_tasks(devices=8, nodes=1)
    srun(tasks=1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    check_tasks(devices=8, nodes=1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can end a process with its parent")
def test_ranks_end_with_the_first_one():
    call = "import os, subprocess, sys, time; from mmlab.runs.ranks import end_with_first_rank; end_with_first_rank(); "
    rank = f"{call} print('there', flush=True); time.sleep(60)"
    start = f"{call} subprocess.run([sys.executable, '-c', {rank!r}], env={{**os.environ, 'LOCAL_RANK': '1'}})"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "LOCAL_RANK"))}
    first = subprocess.Popen([sys.executable, "-c", start], env=env, stdout=subprocess.PIPE)
    assert first.stdout is not None and first.stdout.readline() == b"there\n"
    first.kill()
    first.communicate(timeout=20)  # the other one has the pipe, too
    late = {"LOCAL_RANK": "1", "MMLAB_FIRST_RANK": str(first.pid)}
    assert subprocess.run([sys.executable, "-c", rank], env={**env, **late}, timeout=20).returncode == 1


def lose_a_rank(rank: int, folder: Path) -> None:
    try:
        if rank == 0:
            with connected_ranks():
                torch.distributed.all_reduce(torch.zeros(1))
                torch.distributed.all_reduce(torch.zeros(1))
        else:
            torch.distributed.all_reduce(torch.zeros(1))
    except RunError as error:
        (folder / "error.txt").write_text(str(error))
    os._exit(0)


def test_a_lost_rank_is_named(tmp_path):
    ranks(2, lose_a_rank, tmp_path)
    assert "connection to another process of this run is lost" in (tmp_path / "error.txt").read_text()
    with pytest.raises(RuntimeError, match="another error"), connected_ranks():
        raise RuntimeError("another error")
