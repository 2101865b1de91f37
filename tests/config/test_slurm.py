"""SLURM's tasks against the trainer's ranks, by the variables that srun sets."""

import pytest

from mmlab.config.errors import ConfigError
from mmlab.runs.ranks import check_tasks, under_srun


@pytest.fixture
def srun(monkeypatch):
    """Become a task of a step; without arguments, a batch script."""

    def become(tasks: int | None = None, nodes: int = 1, per_node: int | None = None, name: str = "train") -> None:
        step = {} if tasks is None else {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_NUM_NODES": nodes}
        given = {"SLURM_NTASKS_PER_NODE": per_node} if per_node else {}
        for key, value in {"SLURM_JOB_ID": 7, "SLURM_JOB_NAME": name, **step, **given}.items():
            monkeypatch.setenv(key, str(value))

    for key in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_NTASKS_PER_NODE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(key, raising=False)
    return become


def test_tasks_that_fit(srun):
    srun(tasks=8, nodes=2, per_node=4)
    assert under_srun()
    check_tasks(devices=4, nodes=2)


@pytest.mark.parametrize(
    ("tasks", "devices", "nodes", "sentence"),
    [
        (
            2,
            1,
            1,
            "SLURM started 2 tasks on 1 node, trainer.devices is 1 .* give trainer.devices=2 trainer.num_nodes=1",
        ),
        (1, 8, 1, "SLURM started 1 task on 1 node, trainer.devices is 8 .* submit with --nodes=1 --ntasks-per-node=8"),
        (4, 4, 2, "SLURM started 4 tasks on 1 node, .*num_nodes is 2"),
    ],
)
def test_tasks_that_do_not_fit(srun, tasks, devices, nodes, sentence):
    srun(tasks=tasks, per_node=tasks)
    with pytest.raises(ConfigError, match=sentence):
        check_tasks(devices, nodes)


def test_tasks_have_to_be_counted_by_node(srun):
    srun(tasks=2)
    with pytest.raises(ConfigError, match="--ntasks-per-node=2 in place of --ntasks"):
        check_tasks(devices=2, nodes=1)


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_a_shell_that_srun_opened_is_no_rank(srun, name):
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
