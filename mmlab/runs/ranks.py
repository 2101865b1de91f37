"""The processes of a run: devices, SLURM tasks and gradient accumulation. Torch is imported only to count GPUs."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf import DictConfig, OmegaConf

from mmlab.config.errors import ConfigError, RunError

FSDP = "fsdp"
"""The `trainer.strategy` that is ours, in place of Lightning's of that name."""


def accumulation(global_batch: int, micro_batch: int, world: int) -> int:
    """Return the number of micro batches per optimizer step in each of `world` processes.

    Raises:
        ConfigError: the global batch is not a multiple of `micro_batch * world`; the message names the nearest
            micro batch that divides it, or the nearest global batches if there is none.
    """
    for name, value in (("global_batch", global_batch), ("micro_batch", micro_batch), ("devices", world)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")
    if global_batch % (micro_batch * world) == 0:
        return global_batch // (micro_batch * world)
    per_process, rest = divmod(global_batch, world)
    on = f"global_batch={global_batch} does not divide into micro_batch={micro_batch} on {world} device(s)"
    if rest:
        lower = global_batch - rest
        near = f"{lower} or {lower + world}" if lower else str(world)
        raise ConfigError(f"{on}; give a multiple of {world}: global_batch={near}.")
    divisors = [b for b in range(1, per_process + 1) if per_process % b == 0]
    best = min(divisors, key=lambda b: (abs(b - micro_batch), -b))
    raise ConfigError(f"{on}; the nearest micro batch that divides it is micro_batch={best}.")


def world_size(trainer: DictConfig) -> int:
    """Return the number of processes, devices × nodes.

    `auto` and -1 are all GPUs of this machine; on a CPU, on mps and without a GPU they are one process.

    Raises:
        ConfigError: `trainer.devices` is neither a number, a list of numbers nor `auto`.
    """
    devices = trainer.devices
    if OmegaConf.is_list(devices) and len(devices) and all(isinstance(number, int) for number in devices):
        return len(devices) * trainer.num_nodes
    if isinstance(devices, int) and not isinstance(devices, bool) and (devices > 0 or devices == -1):
        if devices > 0:
            return devices * trainer.num_nodes
    elif devices != "auto":
        raise ConfigError(f"'trainer.devices' must be a number above 0, a list of numbers or auto, not {devices!r}.")
    if trainer.accelerator in ("cpu", "mps"):
        return trainer.num_nodes
    import torch

    return max(1, torch.cuda.device_count()) * trainer.num_nodes


def rank() -> int:
    """Return a number that is 0 on the first process of a run alone, before the processes know each other."""
    return max(int(os.environ.get(name) or 0) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))


_FIRST_RANK = "MMLAB_FIRST_RANK"
"""Environment variable with the process id of the rank that has started this one."""


def end_with_first_rank() -> None:
    """Have the kernel end the ranks that a run starts when its first rank ends, even by SIGKILL; called in all of them.

    Without the first rank the others would wait for it for half an hour, and keep their GPUs. Only Linux can do this.
    Ranks that srun or torchrun has started are ended by these.
    """
    if sys.platform != "linux" or under_srun() or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[_FIRST_RANK] = str(os.getpid())
    elif first := os.environ.get(_FIRST_RANK):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(first):  # it had ended before
            sys.exit(1)


@contextmanager
def connected_ranks() -> Iterator[None]:
    """Raise one sentence if the connection to another rank is lost within the block.

    Raises:
        RunError: another rank has failed or was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if "gloo/transport" not in str(error):
            raise
        raise RunError(
            "The connection to another process of this run is lost: it has failed, see its own message, or was killed. "
            "The same command resumes the run."
        ) from None


def check_devices(trainer: DictConfig) -> None:
    """Check that this machine has the trainer's devices. Called where the run starts, not where a job is submitted.

    Raises:
        ConfigError: the accelerator or some of the devices are missing.
    """
    import torch

    kind, devices = trainer.accelerator, trainer.devices
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    there = {"cpu": 0, "cuda": gpus, "mps": int(mps)}.get(kind, 1 if mps else gpus)
    if kind in ("gpu", "cuda", "mps") and not there:
        what = "mps" if kind == "mps" else "GPU that torch can use"
        raise ConfigError(f"trainer.accelerator={kind}, but this machine has no {what}; give trainer.accelerator=cpu.")
    if OmegaConf.is_list(devices) and not there:
        raise ConfigError(f"trainer.devices={devices} names GPUs; on a CPU give their number, as in trainer.devices=1.")
    if there == 1 and "TORCHELASTIC_RUN_ID" in os.environ:  # each process of torchrun may see only its own GPU
        return
    wanted = range(devices) if isinstance(devices, int) else devices if OmegaConf.is_list(devices) else ()
    if there and any(number not in range(there) for number in wanted):
        count = f"{there} GPU{'' if there == 1 else 's, 0 to ' + str(there - 1)}"
        raise ConfigError(f"trainer.devices={devices}, but torch finds {count}; trainer.devices=auto uses all.")


# Job names of interactive shells (Lightning's convention): there the command starts its processes itself.
SHELLS = ("bash", "interactive")


def under_srun() -> bool:
    """Whether srun started this process as one rank of a run; false in an interactive shell or a batch script."""
    return "SLURM_STEP_NUM_TASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in SHELLS


def check_tasks(devices: int, nodes: int) -> None:
    """Check that this process's SLURM step has one task per rank.

    Args:
        devices: ranks per node.
        nodes: `trainer.num_nodes`.

    Raises:
        ConfigError: srun started another number of tasks, or on another number of nodes.
    """
    if not under_srun() or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    tasks, on = int(os.environ["SLURM_STEP_NUM_TASKS"]), int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    here = tasks // on
    if (tasks, on) != (devices * nodes, nodes):
        raise ConfigError(
            f"SLURM started {_count(tasks, 'task')} on {_count(on, 'node')}, but trainer.devices is {devices} and "
            f"trainer.num_nodes is {nodes}; each device needs one task: give trainer.devices={here} "
            f"trainer.num_nodes={on}, or submit with --nodes={nodes} --ntasks-per-node={devices}."
        )
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ConfigError(
            f"SLURM started {tasks} tasks without a number per node; submit with "
            f"--ntasks-per-node={here} instead of --ntasks."
        )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
