"""Points as jobs of submitit: SLURM's queue, or processes of its local executor. Waiting can be taken up again."""

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
from mmlab.runs.sweep.points import Point

LIST = "jobs.json"
# Seconds: between looks at results, between questions to the queue, for a file system to show a result.
LOOK, ASK, LATE = 1.0, 15.0, 30.0


class Jobs:
    """Runs each point in a job of its own, in which the launcher calls the task.

    Args:
        launcher: Hydra's submitit launcher, set up.
        folder: the sweep's folder; which job is which point is kept there.
        ended: called after each point.
    """

    def __init__(self, launcher: Any, folder: Path, ended: Callable[[], None]):
        self.launcher = launcher
        self.list = folder / LIST
        self.ended = ended
        self.stopped: int | None = None
        self.on_slurm = launcher._EXECUTOR == "slurm"
        self.remaining = "the jobs in the queue go on, and the same command waits for them" if self.on_slurm else ""

    def run(self, points: Sequence[Point]) -> None:
        """Submit `points` (but those that an earlier start left in the queue) and wait until all have ended."""
        jobs = self._left_in_queue(points)
        new = [point for point in points if point not in jobs]
        jobs |= dict(zip(new, self._submit(new), strict=True)) if new else {}
        kept = json.loads(self.list.read_text()) if self.list.exists() else {}
        kept |= {point.name: [job.job_id, job.num_tasks] for point, job in jobs.items()}
        self.list.write_text(json.dumps(kept, indent=1) + "\n")
        for point, job in jobs.items():
            print(f"job {job.job_id}: {point.name}: {point}", flush=True)
        self._wait(jobs)

    def stop(self, signum: int) -> None:
        """Wait no longer."""
        self.stopped = self.stopped or signum

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
        return executor.map_array(self.launcher, *zip(*calls, strict=True))

    def _left_in_queue(self, points: Sequence[Point]) -> dict[Point, Any]:
        if not self.on_slurm or not self.list.exists():
            return {}
        from submitit import SlurmJob

        kept, queue = json.loads(self.list.read_text()), in_queue()
        left = [point for point in points if point.name in kept and kept[point.name][0] in (queue or ())]
        where = self.launcher.params["submitit_folder"]
        return {p: SlurmJob(where, kept[p.name][0], tasks=range(kept[p.name][1])) for p in left}

    def _wait(self, jobs: dict[Point, Any]) -> None:
        waiting, asked, gone = dict(jobs), time.monotonic(), {}
        while waiting and self.stopped is None:
            for point, job in list(waiting.items()):
                parts = [job.task(i) for i in range(job.num_tasks)]
                if all(part.paths.result_pickle.exists() for part in parts) or (
                    time.monotonic() - gone.get(point, time.monotonic()) > LATE
                ):
                    del waiting[point]
                    self._settle(point, parts)
            if time.monotonic() - asked > ASK or not self.on_slurm:
                asked, now = time.monotonic(), self._alive(waiting)
                gone = {point: gone.get(point, asked) for point in waiting if point not in now}
            time.sleep(LOOK)
        if self.stopped is not None and not self.on_slurm:
            for job in waiting.values():
                job.cancel(check=False)

    def _alive(self, waiting: dict[Point, Any]) -> set[Point]:
        if not self.on_slurm:
            return {point for point, job in waiting.items() if not job.done(force_check=True)}
        queue = in_queue()
        return {point for point, job in waiting.items() if queue is None or job.job_id in queue}

    def _settle(self, point: Point, parts: list[Any]) -> None:
        reasons = [reason for part in parts if (reason := _failure(part))]
        point.settle(reasons[0] if reasons else None)
        if point.failure:
            print(f"mmlab: {point.name} failed: {point.failure} ({parts[0].paths.stderr})", file=sys.stderr, flush=True)
        self.ended()


def in_queue() -> set[str] | None:
    """The ids of this user's jobs that wait or run, `12_0` for one of an array; None when SLURM does not answer."""
    try:
        user = os.environ.get("SLURM_JOB_USER") or getpass.getuser()
        command = ["squeue", "--noheader", "--array", "--user", user, "--format", "%i"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return set(done.stdout.split()) if done.returncode == 0 else None


def _failure(part: Any) -> str | None:
    """Why a task of a job failed; None when it returned."""
    if not part.paths.result_pickle.exists():
        return f"job {part.job_id} ended without a result"
    outcome, result = part._get_outcome_and_result()
    if outcome == "error":
        return str(result).strip().splitlines()[-1]
    if result.status is JobStatus.COMPLETED:
        return None
    error = result._return_value
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
