"""Who Lightning believes to have started the ranks, inside and outside of SLURM."""

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from mmlab.training.trainer import environment

TASK = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
STEP = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}


@pytest.fixture
def become(monkeypatch):
    for key in (*TASK, *STEP, "TORCHELASTIC_RUN_ID", "GROUP_RANK"):
        monkeypatch.delenv(key, raising=False)
    return lambda variables: [monkeypatch.setenv(key, value) for key, value in variables.items()]


def test_a_task_of_srun_is_a_rank_and_is_not_requeued_by_lightning(become):
    become(TASK | STEP)
    found = environment()
    assert isinstance(found, SLURMEnvironment)
    assert (found.world_size(), found.global_rank(), found.auto_requeue) == (2, 1, False)


@pytest.mark.parametrize("variables", [TASK, TASK | STEP | {"SLURM_JOB_NAME": "bash"}], ids=["batch", "shell"])
def test_within_an_allocation_but_without_srun_the_ranks_are_started_here(become, variables):
    become(variables)
    assert isinstance(environment(), LightningEnvironment)


def test_elsewhere_lightning_decides(become):
    assert environment() is None
    become(TASK | STEP | {"TORCHELASTIC_RUN_ID": "1", "GROUP_RANK": "0"})
    assert environment() is None
