"""Prove that a run which is killed and goes on is the run that never stopped, bit by bit."""

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
    """Train twice, straight and with kills, and compare; exit code 0 identical, 1 different."""
    parser = argparse.ArgumentParser(
        prog="mmlab resume-check",
        description="Trains a few steps straight, and again with SIGKILL and another start in the middle; compares "
        "batches, weights, optimizer, random state and metrics. Bit-identical on a CPU; on a GPU add "
        "trainer.deterministic=true.",
        epilog="example: mmlab resume-check experiment=llava/align_tiny trainer=cpu",
    )
    parser.add_argument("overrides", nargs="+", help="as for mmlab train")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (%(default)s)")
    parser.add_argument("--every", type=int, default=EVERY, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--kill-at", type=int, nargs="+", default=KILLS, metavar="STEP", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="keep the two runs there; by default a temporary folder")
    args = parser.parse_args(argv)
    if not all(0 < step <= args.steps for step in args.kill_at):
        raise ConfigError(f"--kill-at names steps between 1 and --steps={args.steps}, not {args.kill_at}.")
    work = args.out or Path(tempfile.mkdtemp(prefix="resume-check-"))
    if args.out and args.out.exists():
        raise ConfigError(f"--out={args.out} is there already; name a folder that is not.")
    found = check(args.overrides, work, args.steps, args.every, sorted(args.kill_at))
    if found:
        print(f"different: {found} (the runs are in {work})")
        return 1
    print(f"identical: {args.steps} steps, killed at {', '.join(map(str, sorted(args.kill_at)))}")
    if not args.out:
        shutil.rmtree(work)
    return 0


def check(overrides: list[str], work: Path, steps: int, every: int, kills: list[int]) -> str | None:
    """Make both runs below `work` and return the first difference, or None.

    Raises:
        ConfigError, RunError: a run that could not be made.
    """
    straight, killed = work / "straight", work / "killed"
    print(f"straight: {steps} steps", flush=True)
    _finish(_start(overrides, straight, steps, every), straight)
    for step in kills:
        _finish(_start(overrides, killed, steps, every, kill_at=step), killed, -signal.SIGKILL)
        print(f"killed as step {step} began; starting again", flush=True)
    _finish(_start(overrides, killed, steps, every), killed)
    return compare(straight, killed)


def compare(straight: Path, killed: Path) -> str | None:
    """The first difference of two runs' batches, then of their last checkpoints."""
    from mmlab.training.checkpoint_io import newest_whole, read
    from mmlab.training.resume_proof import difference, read_batches

    expected, _ = read_batches(straight)
    there, differing = read_batches(killed)
    if differing:
        return differing[0]
    for step in sorted(expected.keys() | there.keys()):
        if expected.get(step) != there.get(step):
            return f"step {step} was trained on {expected.get(step)} and on {there.get(step)}"
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
    # A session of its own, so that the kill takes ranks and data workers along, as a node that fails does.
    return subprocess.Popen(
        [sys.executable, "-m", "mmlab.cli", "train", *overrides, *ours],
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _finish(process: subprocess.Popen, run: Path, expected: int = 0) -> None:
    try:
        code = process.wait()
    finally:
        _end(process)
    if code != expected:
        _fail(run, code)


def _end(process: subprocess.Popen) -> None:
    """SIGKILL to all processes of a run."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _fail(run: Path, code: int) -> None:
    lines = (run / "output.log").read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line for line in reversed(lines) if line.startswith("mmlab: ")), lines[-1] if lines else "")
    error = ConfigError if code == 2 else RunError
    raise error(
        f"the run ended with exit code {code}: {said.removeprefix('mmlab: ')} (all it said: {run / 'output.log'})"
    )
