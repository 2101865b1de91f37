"""Points on this machine: each a process of its own, one or several at a time; signals are passed on to them."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from types import FrameType

from mmlab.runs.run import finished
from mmlab.runs.sweep.points import Point

# The last two are what a SLURM job's --signal sends before its time is over.
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Seconds that the ranks of a run have to leave once the first has.
GRACE = 5.0


class Processes:
    """Runs points as processes.

    Args:
        command: what starts a point, before its overrides.
        logs: folder for the points' output where several run at a time.
        ended: called after each point, in the thread that waited for it.
        jobs: how many points run at a time.
    """

    remaining = ""

    def __init__(self, command: Sequence[str], logs: Path, ended: Callable[[], None], jobs: int = 1):
        self.command = [*_dying_with_us(), *command]
        self.logs = logs
        self.ended = ended
        self.jobs = jobs
        self.stopped: int | None = None
        self._running: list[subprocess.Popen] = []
        self._told: set[int] = set()

    def run(self, points: Sequence[Point]) -> None:
        """Run `points` and note in each how it ended."""
        jobs = min(self.jobs, len(points))
        if jobs == 1:
            for point in points:
                self._run(point, {}, None)
            return
        from joblib import Parallel, delayed

        self.logs.mkdir(parents=True, exist_ok=True)
        shares: SimpleQueue[dict[str, str]] = SimpleQueue()
        for share in divide(jobs):
            shares.put(share)

        def work(point: Point) -> None:
            share = shares.get()
            try:
                self._run(point, share, self.logs / f"{point.name}.log")
            finally:
                shares.put(share)

        # The points are processes already; threads wait for them.
        Parallel(n_jobs=jobs, backend="threading", pre_dispatch="all")(map(delayed(work), points))

    def stop(self, signum: int) -> None:
        """Start no further point, and pass the signal on to those that run; they save and end."""
        self.stopped = self.stopped or signum
        for process in list(self._running):
            self._tell(process, signum)

    def _run(self, point: Point, share: dict[str, str], log: Path | None) -> None:
        if self.stopped is not None:
            return
        print(f"[{point.number}] {point.name}: {point}", flush=True)
        with log.open("w") if log else contextlib.nullcontext() as out:
            # In a group of its own, or a terminal's Ctrl-C would arrive twice.
            process = subprocess.Popen(
                [*self.command, *point.overrides],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT if log else None,
                env={**os.environ, **share},
                process_group=0,
            )
            self._running.append(process)
            if self.stopped is not None and process.pid not in self._told:
                self._tell(process, self.stopped)
            code = process.wait()
        self._running.remove(process)
        if code:
            _end_group(process)
        if not code or self.stopped is None:
            point.settle(_reason(code, log) if code else None)
        else:
            point.done = finished(point.folder)  # the signal may have come after its last step
        if point.failure:
            where = f" ({log})" if log else ""
            print(f"mmlab: {point.name} failed: {point.failure}{where}", file=sys.stderr, flush=True)
        self.ended()

    def _tell(self, process: subprocess.Popen, signum: int) -> None:
        self._told.add(process.pid)
        # For a run a closed terminal is SIGTERM: save and leave.
        _signal_group(process, signal.SIGTERM if signum == signal.SIGHUP else signum)


@contextlib.contextmanager
def receiving(receive: Callable[[int], None]) -> Iterator[None]:
    """Call `receive` with each signal that asks this process to end; it does not end by itself."""

    def handle(signum: int, frame: FrameType | None) -> None:
        receive(signum)

    # What was ignored when we were started (nohup) stays so.
    before = {s: signal.getsignal(s) for s in PASSED_ON if signal.getsignal(s) is not signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, handle)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def divide(jobs: int) -> list[dict[str, str]]:
    """Share this machine's CPU threads and GPUs out among `jobs` processes, as environment variables."""
    share = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, _cpus() // jobs))}
    gpus = _gpus()
    if len(gpus) < jobs:
        return [share] * jobs
    return [share | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[job::jobs])} for job in range(jobs)]


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    """The GPUs that a process here would see."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in given.split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(i) for i, line in enumerate(s for s in done.stdout.splitlines() if s.startswith("GPU "))]


def _reason(code: int, log: Path | None) -> str:
    """Why a process ended with `code`: its own sentence where it is in the log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log else []
    said = [line.removeprefix("mmlab: ") for line in lines if line.startswith("mmlab: ")]
    signum = -code if code < 0 else code - 128
    if signum in [known.value for known in signal.Signals]:
        return f"ended by {signal.Signals(signum).name}"
    if said:
        return said[-1].rstrip(".")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"exit code {code}" + (f", {last}" if last else "")


def _end_group(process: subprocess.Popen) -> None:
    """End the other ranks of a run whose first one is gone: they might wait for it forever."""
    end = time.monotonic() + GRACE
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)


def _signal_group(process: subprocess.Popen, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signum)


def _dying_with_us() -> list[str]:
    """A prefix with which a point gets SIGTERM when the sweep is killed: no one else would wait for it."""
    prefix = ["setpriv", "--pdeathsig", "TERM"]
    known = shutil.which(prefix[0]) and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if known else []
