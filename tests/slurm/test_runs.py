"""A run as a SLURM job: uninterrupted, with two tasks, and with every interruption by SLURM.

Each interrupted run equals the uninterrupted one: the same samples in the same steps, the same loss.
"""

import csv
import time
from pathlib import Path

import pytest

from tests.slurm.jobs import ARGS, STEPS, Desk, Job, done, lines, samples, starts, wait_for_steps


def logged_steps(run: Path) -> list[int]:
    """The steps of all rows with a training loss."""
    (file,) = run.rglob("metrics.csv")
    with file.open(newline="") as rows:
        return [int(row["step"]) for row in csv.DictReader(rows) if row.get("train/loss")]


def same_run(run: Path, uninterrupted: Path, ranks: int = 1) -> None:
    """No step is missing, repeated or different."""
    assert samples(run, ranks) == samples(uninterrupted)
    assert done(run)["steps"] == STEPS
    assert done(run)["train/loss"] == pytest.approx(done(uninterrupted)["train/loss"], rel=1e-4 if ranks > 1 else 1e-12)
    assert sorted(logged_steps(run)) == sorted(logged_steps(uninterrupted))


def interrupted(run: Path) -> bool:
    """Whether the run was trained in two starts of one job."""
    return len(starts(run)) == 2 and min(starts(run)) >= 2


def test_a_run_as_a_job(uninterrupted):
    assert len(samples(uninterrupted)) == STEPS and {len(keys) for keys in samples(uninterrupted).values()} == {4}
    assert len(logged_steps(uninterrupted)) == len(set(logged_steps(uninterrupted))) == STEPS


def test_a_signal_requeues_the_job_and_the_run_is_resumed(desk: Desk, uninterrupted):
    """On one node with two tasks, `many_nodes` is the run of `one_node` with gloo's DDP."""
    options = ["--nodes=1", "--gpus-per-node=0", "--ntasks-per-node=2"]
    job = desk.submit(*options, *ARGS, "run.root=signal", "logger=wandb", script="many_nodes", pause=0.5)
    run = desk.folder / "signal" / uninterrupted.name
    wait_for_steps(job, run)
    job.signal("USR2")
    job.start_again()
    assert job.ended() == "COMPLETED", job.log()
    assert interrupted(run)
    same_run(run, uninterrupted, ranks=2)
    # One wandb run in a segment for each start: offline-run-<time>-<id>.
    segments = [folder.name.split("-", 3)[3] for folder in run.glob("wandb/offline-run-*")]
    assert segments == [(run / "wandb_id").read_text().strip()] * 2


def test_a_time_limit_requeues_the_job_before_it_is_reached(desk: Desk, uninterrupted):
    # SLURM checks time limits twice a minute; the signal arrives 30 to 60 seconds after the start.
    job = desk.submit("--time=2", "--signal=USR2@60", *ARGS, "run.root=limit", pause=3)
    run = desk.folder / "limit" / uninterrupted.name
    job.start_again()
    assert job.ended() == "COMPLETED", job.log()
    assert interrupted(run)
    same_run(run, uninterrupted)


def test_a_terminated_job_is_not_requeued_and_the_same_command_resumes_it(desk: Desk, uninterrupted):
    job = desk.submit(*ARGS, "run.root=term", pause=0.5)
    run = desk.folder / "term" / uninterrupted.name
    wait_for_steps(job, run)
    job.signal("TERM")
    assert job.ended() == "FAILED" and job.show("ExitCode") == "143:0", job.log()
    again = desk.submit(*ARGS, "run.root=term")
    # A signal during Python's imports must not end the job.
    again.wait(lambda: again.show("JobState") == "RUNNING", 30, "its start")
    time.sleep(1)
    again.signal("USR2")
    assert again.ended() == "COMPLETED", again.log()
    assert again.show("Restarts") == "0"
    same_run(run, uninterrupted)


def test_a_preempted_job_is_resumed(desk: Desk, uninterrupted):
    """SIGTERM is what SLURM sends without preempt_send_user_signal; the sharded job below gets SIGUSR2."""
    job = desk.submit("--signal=TERM@120", "--partition=low", "--exclusive", *ARGS, "run.root=preempted", pause=0.5)
    run = desk.folder / "preempted" / uninterrupted.name
    wait_for_steps(job, run)
    urgent = Job(desk, desk.run("sbatch", "--parsable", "--partition=high", "--exclusive", "--wrap=true"))
    assert urgent.ended() == "COMPLETED"
    assert len(lines(run)) < 2 * STEPS
    job.start_again()
    assert job.ended() == "COMPLETED", job.log()
    assert interrupted(run)
    same_run(run, uninterrupted)


def test_a_preempted_sharded_job_is_resumed_on_fewer_tasks(desk: Desk, uninterrupted):
    options = ["--partition=low", "--exclusive", "--ntasks-per-node=2"]
    job = desk.submit(*options, *ARGS, "run.root=sharded", "trainer.strategy=fsdp", "logger=wandb", pause=0.5)
    run = desk.folder / "sharded" / uninterrupted.name
    wait_for_steps(job, run)
    urgent = Job(desk, desk.run("sbatch", "--parsable", "--partition=high", "--exclusive", "--wrap=true"))
    assert urgent.ended() == "COMPLETED"
    (saved,) = run.glob("checkpoints/step-*")
    assert len(list(saved.glob("shard-*-of-2.safetensors"))) == 2
    # When a job gets other nodes, SLURM_NTASKS stays what it was.
    job.start_again("NumTasks=1", "TasksPerNode=1")
    assert job.ended() == "COMPLETED", job.log()
    assert interrupted(run)
    assert {line["start"] for line in lines(run, rank=1)} == {"0"}
    same_run(run, uninterrupted, ranks=2)
    segments = [folder.name.split("-", 3)[3] for folder in run.glob("wandb/offline-run-*")]
    assert segments == [(run / "wandb_id").read_text().strip()] * 2


def test_mismatched_tasks_are_refused_in_one_sentence(desk: Desk):
    job = desk.submit("--ntasks-per-node=2", *ARGS, "run.root=refused", "trainer.devices=1")
    assert job.ended() == "FAILED"
    assert "mmlab: SLURM started 2 tasks on 1 node, but trainer.devices is 1" in job.log()
    assert "Traceback" not in job.log()
