"""The launcher between Hydra's sweeper and Hydra's launcher: skips complete points and keeps the table."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from signal import Signals
from threading import Lock
from typing import NoReturn

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from mmlab.config.errors import ConfigError, RunError, UserError, nearest
from mmlab.runs.child import PYTHON
from mmlab.runs.sweep.jobs import Jobs
from mmlab.runs.sweep.local import Processes
from mmlab.runs.sweep.points import Point, Points
from mmlab.runs.sweep.sweep_table import Row, SweepTable, aligned

TRAIN = (*PYTHON, "-m", "mmlab.cli", "train")


class StoppedError(UserError):
    """A signal stopped the sweep; the exit code is a shell's for the signal."""

    def __init__(self, signum: int, sentence: str):
        super().__init__(sentence)
        self.exit_code = 128 + signum


class Failed(JobReturn):
    """The result of a failed point for a search: reading the metric raises, without Hydra's own error output."""

    def __init__(self, point: Point):
        super().__init__()
        self.status = JobStatus.FAILED
        self.message = f"{point.name} failed: {point.failure}."

    @property
    def return_value(self) -> NoReturn:
        raise RunError(self.message)


class PointLauncher(Launcher):
    """Runs points in processes on this machine or in jobs of submitit, depending on Hydra's launcher.

    Args:
        points: the sweep's points.
        folder: the sweep's folder.
        launcher: the launcher of `hydra/launcher=…`, set up.

    Raises:
        ConfigError: an unsupported launcher.
    """

    def __init__(self, points: Points, folder: Path, launcher: Launcher):
        cfg = points.multirun.cfg
        self.points = points
        self.folder = folder
        self.metric = str(cfg.sweep.metric)
        self.maximize = cfg.sweep.direction == "maximize"
        self._writing = Lock()
        if hasattr(launcher, "_EXECUTOR"):
            self.runner: Jobs | Processes = Jobs(launcher, folder, self.report)
            return
        jobs, chosen = 1, points.multirun.plugin("launcher")
        if chosen == "JoblibLauncher":
            from joblib import effective_n_jobs

            jobs = effective_n_jobs(cfg.hydra.launcher.n_jobs)
        elif chosen != "BasicLauncher":
            raise ConfigError(f"{chosen} is not supported; give hydra/launcher=joblib or slurm.")
        command = [*TRAIN, *points.multirun.flags, *points.multirun.plugin_free]
        self.runner = Processes(command, folder / "logs", self.report, jobs)

    def setup(self, **kwargs: object) -> None:
        """Do nothing: the wrapped launcher is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the points that a search suggests and return their metrics; a failed point is a failed trial.

        Raises:
            ConfigError: a point's config is invalid.
            RunError: a complete run lacks the metric.
            StoppedError: a signal stopped the sweep.
        """
        batch = self.points.take(job_overrides)
        self.run(batch)
        return [self._result(point) for point in batch]

    def run(self, batch: Sequence[Point]) -> None:
        """Run the points that are not complete.

        Raises:
            StoppedError: a signal stopped the sweep.
        """
        self.report()
        if todo := [point for point in dict.fromkeys(batch) if not point.done]:
            self.runner.run(todo)
        if self.runner.stopped is not None:
            complete = sum(point.done for point in self.points.all.values())
            rest = self.runner.remaining or "the same command runs the rest"
            name = Signals(self.runner.stopped).name
            message = f"Stopped by {name}: {complete} of {len(self.points.all)} points are complete; {rest}."
            raise StoppedError(self.runner.stopped, message)

    def stop(self, signum: int) -> None:
        """Pass a signal on to the running points, and start no more."""
        self.runner.stop(signum)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Print the table at the end, also after an error or a signal.

        Raises:
            RunError: points failed, or the complete runs lack the metric.
        """
        try:
            yield
        finally:
            if self.points.all:
                self.report()
                table = self._table()
                means = f"\n{aligned(table.means_grid())}\n" if table.settings else ""
                print(f"\n{table.text()}\n{means}\n{self.folder}/table.csv, table.png", flush=True)
        if failed := self.failed():
            named = ", ".join(f"{point.name} ({point})" for point in failed[:5]) + (", …" if len(failed) > 5 else "")
            raise RunError(
                f"{len(failed)} of {len(self.points.all)} points failed: {named}; the same command runs only these."
            )
        complete = [point for point in self.points.all.values() if point.done]
        if complete and not any(self.metric in point.metrics for point in complete):
            raise RunError(self._no_metric(complete[0]))

    def report(self) -> None:
        """Write the current table into the sweep's folder."""
        from mmlab.runs.sweep.sweep_picture import write_sweep

        with self._writing:
            write_sweep(self._table(), self.folder)

    def failed(self) -> list[Point]:
        """The points that were run and failed."""
        return [point for point in self.points.all.values() if point.failure]

    def best(self) -> Point | None:
        """The complete point with the best finite metric."""
        scored = {p: p.metrics.get(self.metric) for p in self.points.all.values()}
        finite = {p: v for p, v in scored.items() if isinstance(v, int | float) and math.isfinite(v)}
        return (max if self.maximize else min)(finite, key=lambda point: finite[point], default=None)

    def _table(self) -> SweepTable:
        rows = [Row(point.label, point.name, point.status, point.metrics) for point in self.points.all.values()]
        return SweepTable(self.points.sweep, self.metric, self.maximize, rows)

    def _result(self, point: Point) -> JobReturn:
        if not point.done:
            return Failed(point)
        if self.metric not in point.metrics:
            raise RunError(self._no_metric(point))
        result = JobReturn()
        result.status, result.return_value = JobStatus.COMPLETED, point.metrics[self.metric]
        return result

    def _no_metric(self, point: Point) -> str:
        names = [name for name in point.metrics if name != "steps"]
        hint = nearest(self.metric, names) or f" It has {', '.join(names)}."
        return f"{point.name} has no metric '{self.metric}'.{hint} Give sweep.metric=…; no run is repeated."
