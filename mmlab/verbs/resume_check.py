"""Check that a run that is killed and resumed is bit-identical to an uninterrupted run."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from mmlab.config.errors import ConfigError, RunError

STEPS, EVERY, KILLS = 12, 5, (3, 8)


def main(argv: list[str]) -> int:
    """Train twice, once with kills, and compare; the exit code is 0 if the runs are identical, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="mmlab resume-check",
        description="Trains a few steps without interruption, and again with SIGKILL and restarts; compares batches, "
        "weights, optimizer, random state and metrics. They are bit-identical on a CPU; on a GPU add "
        "trainer.deterministic=true.",
        epilog="example: mmlab resume-check experiment=llava/align_tiny trainer=cpu",
    )
    parser.add_argument("overrides", nargs="+", help="as for mmlab train")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (%(default)s)")
    parser.add_argument("--every", type=int, default=EVERY, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--kill-at", type=int, nargs="+", default=KILLS, metavar="STEP", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the two runs, which are kept; by default a temporary one")
    args = parser.parse_args(argv)
    if not all(0 < step <= args.steps for step in args.kill_at):
        raise ConfigError(f"--kill-at={args.kill_at} must be between 1 and --steps={args.steps}.")
    if args.out and args.out.exists():
        raise ConfigError(f"--out={args.out} exists already; give a new folder.")
    work = args.out or Path(tempfile.mkdtemp(prefix="resume-check-"))
    difference = check(args.overrides, work, args.steps, args.every, sorted(args.kill_at))
    if difference:
        print(f"different: {difference} (the runs are in {work})")
        return 1
    print(f"identical: {args.steps} steps, killed at {', '.join(map(str, sorted(args.kill_at)))}")
    if not args.out:
        shutil.rmtree(work)
    return 0


def check(overrides: list[str], work: Path, steps: int, every: int, kills: list[int]) -> str | None:
    """Train both runs in `work` and return their first difference, or None.

    Raises:
        ConfigError, RunError: a run failed.
    """
    straight, killed = work / "straight", work / "killed"
    print(f"straight: {steps} steps", flush=True)
    _finish(_start(overrides, straight, steps, every), straight)
    for step in kills:
        _finish(_start(overrides, killed, steps, every, kill_at=step), killed, -signal.SIGKILL)
        print(f"killed at the start of step {step}; resuming", flush=True)
    _finish(_start(overrides, killed, steps, every), killed)
    return compare(straight, killed)


def compare(straight: Path, killed: Path) -> str | None:
    """Return the first difference between two runs' batches, or else between their last checkpoints."""
    from mmlab.training.checkpoint_io import newest_whole, read
    from mmlab.training.resume_proof import difference, read_batches

    expected, _ = read_batches(straight)
    batches, repeated = read_batches(killed)
    if repeated:
        return repeated[0]
    for step in sorted(expected.keys() | batches.keys()):
        if expected.get(step) != batches.get(step):
            return f"step {step} was trained on {expected.get(step)} and on {batches.get(step)}"
    states = []
    for run in (straight, killed):
        path = newest_whole(run / "checkpoints", lambda fault: None)
        if path is None:
            return f"{run} has no checkpoint"
        states.append(read(path))
    return difference(*states)


def _start(overrides: list[str], run: Path, steps: int, every: int, kill_at: int | None = None) -> subprocess.Popen:
    ours = [
        f"run.dir={run}",
        "logger=none",
        f"trainer.max_steps={steps}",
        f"callbacks.checkpoint.every_n_steps={every}",
        "+callbacks.batch_log._target_=mmlab.training.resume_proof.BatchLog",
        f"+callbacks.batch_log.folder={run}",
        f"+callbacks.batch_log.kill_at={'null' if kill_at is None else kill_at}",
    ]
    run.mkdir(parents=True, exist_ok=True)
    log = (run / "output.log").open("a")
    # In its own session, so that the kill also ends ranks and data workers, as the failure of a node does.
    return subprocess.Popen(
        [sys.executable, "-m", "mmlab.cli", "train", *overrides, *ours],
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _finish(process: subprocess.Popen, run: Path, expected: int = 0) -> None:
    """Wait for a run and check its exit code; if we are interrupted, kill all its processes."""
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == expected:
        return
    log = run / "output.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.startswith("mmlab: ")), lines[-1] if lines else "")
    error = ConfigError if code == 2 else RunError
    raise error(f"The run ended with exit code {code}: {last.removeprefix('mmlab: ')} (its output: {log})")
