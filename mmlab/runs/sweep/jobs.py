"""Points as jobs of submitit, on SLURM or in its local executor; a restarted sweep waits for jobs in the queue."""

import getpass
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobStatus

from mmlab.config.errors import UserError
from mmlab.runs.child import SAFE_PATH
from mmlab.runs.disk import write_json
from mmlab.runs.sweep.points import Point

JOBS = "jobs.json"
# Seconds: between checks for results, between queries of the queue, and until a result must be visible on a shared
# file system after its job has left the queue.
CHECK, QUERY, VISIBLE = 1.0, 15.0, 30.0


class Jobs:
    """Runs each point in its own job, in which the launcher calls the task.

    Args:
        launcher: Hydra's submitit launcher, set up.
        folder: the sweep's folder; its `jobs.json` maps each point to its job.
        ended: called after each point.
    """

    def __init__(self, launcher: Any, folder: Path, ended: Callable[[], None]):
        self.launcher = launcher
        self.file = folder / JOBS
        self.ended = ended
        self.stopped: int | None = None
        self.on_slurm = launcher._EXECUTOR == "slurm"
        self.remaining = "jobs in the queue continue; the same command waits for them" if self.on_slurm else ""

    def run(self, points: Sequence[Point]) -> None:
        """Submit `points`, except those in the queue from an earlier start, and wait until all have ended."""
        jobs = self._queued(points)
        new = [point for point in points if point not in jobs]
        jobs |= dict(zip(new, self._submit(new), strict=True)) if new else {}
        submitted = self._submitted() | {point.name: [job.job_id, job.num_tasks] for point, job in jobs.items()}
        write_json(self.file, submitted)
        for point, job in jobs.items():
            print(f"job {job.job_id}: {point.name}: {point}", flush=True)
        self._wait(jobs)

    def stop(self, signum: int) -> None:
        """Stop waiting."""
        self.stopped = self.stopped or signum

    def _submitted(self) -> dict[str, list[Any]]:
        """Run → its job's id and number of tasks."""
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def _submit(self, points: Sequence[Point]) -> list[Any]:
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

        params, kind = dict(self.launcher.params), self.launcher._EXECUTOR
        params.pop("_target_", None)
        own = {f"{kind}_{key}": params.pop(key) for key in ("max_num_timeout",) if key in params}
        executor = submitit.AutoExecutor(params.pop("submitit_folder"), cluster=kind, **own)
        common = {field.name for field in fields(BaseQueueConf)}
        executor.update_parameters(**{key if key in common else f"{kind}_{key}": v for key, v in params.items()})
        calls = [
            (point.overrides, "hydra.sweep.dir", number, point.name, Singleton.get_state())
            for number, point in enumerate(points)
        ]
        os.environ |= SAFE_PATH  # jobs start in this process's environment and folder
        return executor.map_array(self.launcher, *zip(*calls, strict=True))

    def _queued(self, points: Sequence[Point]) -> dict[Point, Any]:
        """The jobs of an earlier start that are still in SLURM's queue."""
        submitted = self._submitted() if self.on_slurm else {}
        if not submitted:
            return {}
        from submitit import SlurmJob

        queue, folder = job_ids() or (), self.launcher.params["submitit_folder"]
        earlier = {point: submitted[point.name] for point in points if point.name in submitted}
        return {
            point: SlurmJob(folder, id, tasks=range(tasks)) for point, (id, tasks) in earlier.items() if id in queue
        }

    def _wait(self, jobs: dict[Point, Any]) -> None:
        waiting, last_query, left_queue = dict(jobs), time.monotonic(), {}
        while waiting and self.stopped is None:
            for point, job in list(waiting.items()):
                tasks = [job.task(i) for i in range(job.num_tasks)]
                if all(task.paths.result_pickle.exists() for task in tasks) or (
                    time.monotonic() - left_queue.get(point, time.monotonic()) > VISIBLE
                ):
                    del waiting[point]
                    self._record(point, tasks)
            if time.monotonic() - last_query > QUERY or not self.on_slurm:
                last_query, alive = time.monotonic(), self._alive(waiting)
                left_queue = {point: left_queue.get(point, last_query) for point in waiting if point not in alive}
            time.sleep(CHECK)
        if self.stopped is not None and not self.on_slurm:
            for job in waiting.values():
                job.cancel(check=False)

    def _alive(self, waiting: dict[Point, Any]) -> set[Point]:
        if not self.on_slurm:
            return {point for point, job in waiting.items() if not job.done(force_check=True)}
        queue = job_ids()
        return {point for point, job in waiting.items() if queue is None or job.job_id in queue}

    def _record(self, point: Point, tasks: list[Any]) -> None:
        reasons = [reason for task in tasks if (reason := _failure(task))]
        point.record(reasons[0] if reasons else None)
        if point.failure:
            print(f"mmlab: {point.name} failed: {point.failure} ({tasks[0].paths.stderr})", file=sys.stderr, flush=True)
        self.ended()


def job_ids() -> set[str] | None:
    """The ids of this user's jobs in SLURM's queue, `12_0` for one of an array; None if SLURM does not answer."""
    try:
        user = os.environ.get("SLURM_JOB_USER") or getpass.getuser()
        command = ["squeue", "--noheader", "--array", "--user", user, "--format", "%i"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return set(done.stdout.split()) if done.returncode == 0 else None


def _failure(task: Any) -> str | None:
    """The reason why a task of a job failed; None if it returned."""
    if not task.paths.result_pickle.exists():
        return f"job {task.job_id} ended without a result"
    outcome, result = task._get_outcome_and_result()
    if outcome == "error":
        return str(result).strip().splitlines()[-1]
    if result.status is JobStatus.COMPLETED:
        return None
    error = result._return_value
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
