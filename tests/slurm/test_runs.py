"""One run as a job: to its end, with two tasks, and through every way in which SLURM interrupts it.

Each interrupted run ends as the one that nothing interrupted: the same samples in the same steps, the same loss.
"""

import csv
import time
from pathlib import Path

import pytest

from tests.slurm.jobs import ARGS, STEPS, Desk, Job, done, lines, samples, starts, wait_for_steps


def logged_steps(run: Path) -> list[int]:
    """The steps of all rows that hold a training loss."""
    (file,) = run.rglob("metrics.csv")
    with file.open(newline="") as rows:
        return [int(row["step"]) for row in csv.DictReader(rows) if row.get("train/loss")]


def same_run(run: Path, whole: Path, ranks: int = 1) -> None:
    """Nothing lost, nothing repeated, nothing different."""
    assert samples(run, ranks) == samples(whole)
    assert done(run)["steps"] == STEPS
    assert done(run)["train/loss"] == pytest.approx(done(whole)["train/loss"], rel=1e-4 if ranks > 1 else 1e-12)
    assert sorted(logged_steps(run)) == sorted(logged_steps(whole))


def interrupted(run: Path) -> bool:
    """Whether the run was trained in two starts of one job."""
    return len(starts(run)) == 2 and min(starts(run)) >= 2


def test_a_run_as_a_job(whole):
    assert len(samples(whole)) == STEPS and {len(keys) for keys in samples(whole).values()} == {4}
    assert len(logged_steps(whole)) == len(set(logged_steps(whole))) == STEPS


@pytest.mark.parametrize("script", ["one_node", "many_nodes"])
def test_a_signal_requeues_the_job_and_the_run_goes_on(desk: Desk, whole, script):
    """On one node with two tasks, `many_nodes` is the run of `one_node` with gloo's DDP."""
    ranks = {"one_node": 1, "many_nodes": 2}[script]
    options = ["--nodes=1", "--gpus-per-node=0", f"--ntasks-per-node={ranks}"]
    job = desk.submit(*options, *ARGS, f"run.root={script}", "logger=wandb", script=script, pause=0.5)
    run = desk.folder / script / whole.name
    wait_for_steps(job, run)
    job.signal("USR2")
    job.start_again()
    assert job.ended() == "COMPLETED", job.log()
    assert interrupted(run)
    same_run(run, whole, ranks)
    # One wandb run in a segment for each start: offline-run-<time>-<id>.
    segments = [folder.name.split("-", 3)[3] for folder in run.glob("wandb/offline-run-*")]
    assert segments == [(run / "wandb_id").read_text().strip()] * 2


def test_a_time_limit_requeues_the_job_before_it_is_reached(desk: Desk, whole):
    # SLURM looks at its clock twice a minute, and the signal comes half a minute to a minute after the start.
    job = desk.submit("--time=2", "--signal=USR2@60", *ARGS, "run.root=limit", pause=3)
    run = desk.folder / "limit" / whole.name
    job.start_again()
    assert job.ended() == "COMPLETED", job.log()
    assert interrupted(run)
    same_run(run, whole)


def test_a_terminated_job_is_not_requeued_and_the_same_command_goes_on(desk: Desk, whole):
    job = desk.submit(*ARGS, "run.root=term", pause=0.5)
    run = desk.folder / "term" / whole.name
    wait_for_steps(job, run)
    job.signal("TERM")
    assert job.ended() == "FAILED" and job.show("ExitCode") == "143:0", job.log()
    again = desk.submit(*ARGS, "run.root=term")
    # A signal that comes while Python still loads must not end the job.
    again.wait(lambda: again.show("JobState") == "RUNNING", 30, "its start")
    time.sleep(1)
    again.signal("USR2")
    assert again.ended() == "COMPLETED", again.log()
    assert again.show("Restarts") == "0"
    same_run(run, whole)


# With SIGTERM as SLURM does it without preempt_send_user_signal.
@pytest.mark.parametrize("name", ["USR2", "TERM"])
def test_a_preempted_job_goes_on(desk: Desk, whole, name):
    root = f"preempted-{name}"
    job = desk.submit(f"--signal={name}@120", "--partition=low", "--exclusive", *ARGS, f"run.root={root}", pause=0.5)
    run = desk.folder / root / whole.name
    wait_for_steps(job, run)
    urgent = Job(desk, desk.run("sbatch", "--parsable", "--partition=high", "--exclusive", "--wrap=true"))
    assert urgent.ended() == "COMPLETED"
    assert len(lines(run)) < 2 * STEPS
    job.start_again()
    assert job.ended() == "COMPLETED", job.log()
    assert interrupted(run)
    same_run(run, whole)


def test_tasks_that_do_not_fit_the_devices_are_refused_in_one_sentence(desk: Desk):
    job = desk.submit("--ntasks-per-node=2", *ARGS, "run.root=refused", "trainer.devices=1")
    assert job.ended() == "FAILED"
    assert "mmlab: SLURM started 2 tasks on 1 node, trainer.devices is 1" in job.log()
    assert "Traceback" not in job.log()
