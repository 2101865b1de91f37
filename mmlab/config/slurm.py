"""What SLURM says about the processes of a run; no heavy import."""

import os

from mmlab.config.errors import ConfigError

# Lightning's convention too: in a shell that srun opened, the command starts its processes itself.
SHELLS = ("bash", "interactive")


def under_srun() -> bool:
    """Whether srun started this process as one rank of a run, rather than a shell or a batch script."""
    return "SLURM_STEP_NUM_TASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in SHELLS


def check_tasks(devices: int, nodes: int) -> None:
    """Compare the tasks of the SLURM step that this process belongs to with the trainer's ranks.

    Args:
        devices: ranks of a node.
        nodes: `trainer.num_nodes`.

    Raises:
        ConfigError: srun started more or fewer tasks than there are ranks, or on other nodes.
    """
    if not under_srun() or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    tasks, on = int(os.environ["SLURM_STEP_NUM_TASKS"]), int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    here = tasks // on
    if (tasks, on) != (devices * nodes, nodes):
        raise ConfigError(
            f"SLURM started {_count(tasks, 'task')} on {_count(on, 'node')}, trainer.devices is {devices} and "
            f"trainer.num_nodes is {nodes}: each device takes one task; give trainer.devices={here} "
            f"trainer.num_nodes={on}, or submit with --nodes={nodes} --ntasks-per-node={devices}."
        )
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ConfigError(
            f"SLURM started {tasks} tasks, but not how many on each node was given; submit with "
            f"--ntasks-per-node={here} in place of --ntasks."
        )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
