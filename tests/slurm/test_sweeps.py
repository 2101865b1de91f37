"""Sweeps whose points are jobs of submitit, one of them requeued by SLURM."""

import csv
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from tests.slurm.jobs import ARGS, STEPS, Desk, Job, done, samples, starts, wait_for_steps

SWEEP = (
    "hydra/launcher=slurm",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.timeout_min=30",
    "hydra.launcher.signal_delay_s=60",
)


@contextmanager
def sweep(desk: Desk, *overrides: str, pause: float):
    """Run a sweep that must succeed; the body of the `with` statement runs meanwhile."""
    command = [sys.executable, "-m", "mmlab.cli", "train", "-m", *SWEEP, *ARGS, *overrides]
    log = desk.folder / "sweep.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=desk.folder, env=desk.env(PROBE_PAUSE=str(pause)), stdout=out, stderr=subprocess.STDOUT
        )
        try:
            yield
            assert process.wait(240) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()


def submitted(desk: Desk, root: str, points: int) -> list[tuple[Path, Job]]:
    """The folders and jobs of a sweep's points, once they are in the queue."""
    waiting = Job(desk, "of the sweep")
    waiting.log = lambda: (desk.folder / "sweep.log").read_text()  # type: ignore[method-assign]
    waiting.wait(lambda: len(list((desk.folder / root).glob("sweeps/*/jobs.json"))) == 1, 90, "the queue")
    (file,) = (desk.folder / root).glob("sweeps/*/jobs.json")
    waiting.wait(lambda: os.path.getsize(file) > 0, 10, "the list of jobs")
    jobs = json.loads(file.read_text())
    assert len(jobs) == points
    return [(desk.folder / root / name, Job(desk, number)) for name, (number, _) in jobs.items()]


def test_two_points_with_one_requeued(desk: Desk, uninterrupted):
    with sweep(desk, "run.root=points", "optim.lr=1e-3,2e-3", pause=0.5):
        points = submitted(desk, "points", 2)
        run, job = points[0]
        wait_for_steps(job, run)
        job.signal("USR2")
        job.start_again()
    assert [len(starts(folder)) for folder, _ in points] == [2, 1]
    assert all(samples(folder) == samples(uninterrupted) for folder, _ in points)
    (file,) = (desk.folder / "points").glob("sweeps/*/table.csv")
    with file.open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 2 and {row["status"] for row in rows} == {"complete"}
    assert len({done(folder)["train/loss"] for folder, _ in points}) == 2


def test_a_point_on_two_tasks_is_requeued(desk: Desk, uninterrupted):
    with sweep(desk, "run.root=two", "optim.lr=5e-4", "trainer.devices=2", pause=0.5):
        ((run, job),) = submitted(desk, "two", 1)
        wait_for_steps(job, run)
        job.signal("USR2")
        job.start_again()
    assert len(starts(run)) == 2 and done(run)["steps"] == STEPS
    assert samples(run, ranks=2) == samples(uninterrupted)
