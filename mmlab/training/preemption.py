"""Signals that ask a run to save and exit: noted at once, obeyed at the end of the optimizer step.

SLURM and submitit send SIGUSR1 or SIGUSR2 before they take a node away, and SIGTERM when they do; a person presses
Ctrl-C. A handler may run in the middle of a step, so it only notes the signal.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose

from mmlab.config.errors import UserError

REQUEUE_ON = (signal.SIGUSR1, signal.SIGUSR2)
LEAVE_ON = (*REQUEUE_ON, signal.SIGTERM, signal.SIGINT)


class Preempted(UserError):
    """The run was asked to exit and has saved; exit code 143, or 130 after Ctrl-C."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number
        self.exit_code = 130 if number == signal.SIGINT else 143

    def __reduce__(self) -> tuple[Any, ...]:
        # submitit pickles what a task raised and sends it to the sweep.
        return type(self), (str(self), self.number)


class Signals:
    """Notes the signals of `LEAVE_ON` between `listen` and `restore`.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self):
        self.noted = 0
        self._before: dict[int, Any] = {}
        self._group: Any = None

    def listen(self) -> None:
        """Install the handlers, on the main thread; a collective call where there are several ranks."""
        self.noted = 0
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in LEAVE_ON}
        if _ranks() > 1 and torch.distributed.get_backend() != "gloo":
            # On the host, so that the GPU's queue does not drain at every step.
            self._group = torch.distributed.new_group(backend="gloo")

    def restore(self) -> None:
        """Restore the earlier handlers, except Lightning's for SIGTERM.

        That one broadcasts (2.6), which fails or hangs if other ranks have exited. Lightning's trainer restores the
        handlers from before it when it ends.
        """
        for number, handler in self._before.items():
            if not isinstance(handler, _HandlersCompose):
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def agreed(self) -> int:
        """The signal that any rank has noted, or 0; a collective call, so that all exit after the same step."""
        if _ranks() == 1:
            return self.noted
        # The first of LEAVE_ON that any rank noted: SIGTERM on one rank must not hide a requeue signal on another.
        urgency = torch.tensor(len(LEAVE_ON) - LEAVE_ON.index(self.noted) if self.noted else 0)
        torch.distributed.all_reduce(urgency, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(LEAVE_ON[-int(urgency)]) if urgency else 0

    def owner(self, number: int) -> Callable[[int, Any], Any] | None:
        """The earlier handler, of a launcher: submitit's requeues the job and exits."""
        handler = self._before.get(number)
        return handler if number in REQUEUE_ON and callable(handler) else None

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            if self.noted == signal.SIGINT:
                raise KeyboardInterrupt
            print("\nmmlab: saving at the end of this step; Ctrl-C again exits at once", file=sys.stderr, flush=True)
        # In a preemption SIGTERM follows SIGUSR, and must not hide that the job is to be requeued.
        if self.noted not in REQUEUE_ON:
            self.noted = number


def requeue(number: int, env: Mapping[str, str] = os.environ, run: Callable[..., Any] = subprocess.run) -> str:
    """Requeue this SLURM batch job if `number` asks for it; return what was done, for the message.

    SLURM itself requeues a job that it preempts (SIGTERM alone), so only SIGUSR1 and SIGUSR2 do it here.
    """
    job = env.get("SLURM_JOB_ID")
    if job is None or number not in REQUEUE_ON or env.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return "the same command resumes it"
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    try:
        done = run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} could not be requeued ({error}); the same command resumes it"
    if done.returncode:
        return f"job {job} could not be requeued ({done.stderr.strip()}); the same command resumes it"
    return f"job {job} is requeued and will resume"


def _ranks() -> int:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1
