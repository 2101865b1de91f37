"""Points as processes on this machine, one or several at a time; signals are passed on to them."""

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

from mmlab.runs.child import environment
from mmlab.runs.finished_runs import finished
from mmlab.runs.sweep.points import Point

# SLURM jobs often get one of the last two (--signal) before their time is over.
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GRACE = 5.0  # seconds for the other ranks of a run to exit after the first


class Processes:
    """Runs points as processes.

    Args:
        command: the command that starts a point, without its overrides.
        logs: folder for the output of points that run at the same time.
        ended: called after each point, in the thread that waited for it.
        jobs: number of points that run at the same time.
    """

    remaining = ""

    def __init__(self, command: Sequence[str], logs: Path, ended: Callable[[], None], jobs: int = 1):
        self.command = [*_dying_with_us(), *command]
        self.logs = logs
        self.ended = ended
        self.jobs = jobs
        self.stopped: int | None = None
        self._running: list[subprocess.Popen] = []
        self._signaled: set[int] = set()

    def run(self, points: Sequence[Point]) -> None:
        """Run `points` and record the outcome of each."""
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

        # Threads suffice to wait for the processes.
        Parallel(n_jobs=jobs, backend="threading", pre_dispatch="all")(map(delayed(work), points))

    def stop(self, signum: int) -> None:
        """Start no more points, and pass the signal on to the running ones, which save and exit."""
        self.stopped = self.stopped or signum
        for process in list(self._running):
            self._signal(process, signum)

    def _run(self, point: Point, share: dict[str, str], log: Path | None) -> None:
        if self.stopped is not None:
            return
        print(f"[{point.number}] {point.name}: {point}", flush=True)
        with log.open("w") if log else contextlib.nullcontext() as out:
            # In its own process group; otherwise Ctrl-C in a terminal would arrive twice.
            process = subprocess.Popen(
                [*self.command, *point.overrides],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT if log else None,
                env=environment(**share),
                process_group=0,
            )
            self._running.append(process)
            if self.stopped is not None and process.pid not in self._signaled:
                self._signal(process, self.stopped)
            code = process.wait()
        self._running.remove(process)
        if code:
            _end_group(process)
        if not code or self.stopped is None:
            point.record(_reason(code, log) if code else None)
        else:
            point.done = finished(point.folder)  # the signal may have arrived after its last step
        if point.failure:
            where = f" ({log})" if log else ""
            print(f"mmlab: {point.name} failed: {point.failure}{where}", file=sys.stderr, flush=True)
        self.ended()

    def _signal(self, process: subprocess.Popen, signum: int) -> None:
        self._signaled.add(process.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # A run saves and exits on SIGTERM, but not on SIGHUP (a closed terminal).
            os.killpg(process.pid, signal.SIGTERM if signum == signal.SIGHUP else signum)


@contextlib.contextmanager
def receiving(receive: Callable[[int], None]) -> Iterator[None]:
    """Call `receive` with each signal that would end this process, instead of ending it."""

    def handle(signum: int, frame: FrameType | None) -> None:
        receive(signum)

    # Signals that were ignored at the start (nohup) stay ignored.
    before = {s: signal.getsignal(s) for s in PASSED_ON if signal.getsignal(s) is not signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, handle)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def divide(jobs: int) -> list[dict[str, str]]:
    """Divide this machine's CPU threads and GPUs among `jobs` processes; returns environment variables for each."""
    share = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, _cpus() // jobs))}
    gpus = _gpus()
    if len(gpus) < jobs:
        return [share] * jobs
    return [share | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[job::jobs])} for job in range(jobs)]


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    """The GPUs that a process on this machine can use."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(i) for i, line in enumerate(s for s in done.stdout.splitlines() if s.startswith("GPU "))]


def _reason(code: int, log: Path | None) -> str:
    """The reason why a process ended with `code`: the last error of mmlab in the log, if there is one."""
    signum = -code if code < 0 else code - 128
    with contextlib.suppress(ValueError):
        return f"ended by {signal.Signals(signum).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log else []
    errors = [line.removeprefix("mmlab: ") for line in lines if line.startswith("mmlab: ")]
    if errors:
        return errors[-1].rstrip(".")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"exit code {code}" + (f", {last}" if last else "")


def _end_group(process: subprocess.Popen) -> None:
    """End the remaining ranks of a run whose first rank has exited; they might wait for it forever."""
    end = time.monotonic() + GRACE
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)


def _dying_with_us() -> list[str]:
    """A command prefix with which a point gets SIGTERM if the sweep is killed; empty if unsupported."""
    prefix = ["setpriv", "--pdeathsig", "TERM"]
    works = shutil.which(prefix[0]) and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if works else []
