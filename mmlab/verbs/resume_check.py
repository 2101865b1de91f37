"""Check that a run that is killed and resumed is bit-identical to an uninterrupted run."""

import argparse
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmlab.config.errors import ConfigError, RunError
from mmlab.runs.child import PYTHON, environment

STEPS, EVERY, VAL_EVERY, KILLS = 12, 5, 4, ("3", "7", "8v", "12v")


def main(argv: list[str]) -> int:
    """Train twice, once with kills, and compare; the exit code is 0 if the runs are identical, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="mmlab resume-check",
        description="Trains a few steps without interruption, and again with SIGKILL and restarts; compares batches, "
        "weights, optimizer, random state, metrics and data report. They are bit-identical on a CPU; on a GPU add "
        "trainer.deterministic=true.",
        epilog="example: mmlab resume-check experiment=llava/align_tiny trainer=cpu",
    )
    parser.add_argument("overrides", nargs="+", help="as for mmlab train")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (%(default)s)")
    parser.add_argument("--every", type=int, default=EVERY, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--val-every", type=int, default=VAL_EVERY, help="steps between validations (%(default)s)")
    parser.add_argument(
        "--kill-at",
        nargs="+",
        default=KILLS,
        metavar="STEP",
        help=f"kill when a step begins, or (8v) when its validation begins; the default is {' '.join(KILLS)}",
    )
    parser.add_argument("--out", type=Path, help="folder for the two runs, which are kept; by default a temporary one")
    args = parser.parse_args(argv)
    kills = _kills(args.kill_at, args.steps, args.val_every)
    if args.out and args.out.exists():
        raise ConfigError(f"--out={args.out} exists already; give a new folder.")
    work = args.out or Path(tempfile.mkdtemp(prefix="resume-check-"))
    kills, difference = check(args.overrides, work, args.steps, args.every, args.val_every, kills)
    if difference:
        print(f"different: {difference} (the runs are in {work})")
        return 1
    print(f"identical: {args.steps} steps, killed at {', '.join(kills)}")
    if not args.out:
        shutil.rmtree(work)
    return 0


def _kills(texts: Sequence[str], steps: int, val_every: int) -> list[str]:
    """Check the kills and sort them by time; the validation of a step is after its start."""
    for text in texts:
        step = int(text.removesuffix("v")) if re.fullmatch(r"[0-9]+v?", text) else 0
        if not 0 < step <= steps:
            raise ConfigError(f"--kill-at={text} must be a step between 1 and --steps={steps}, such as 3 or 8v.")
        if text.endswith("v") and step % val_every and step != steps:
            raise ConfigError(f"--kill-at={text}: with --val-every={val_every} no validation follows step {step}.")
    return sorted(texts, key=lambda text: (int(text.removesuffix("v")), text.endswith("v")))


def check(
    overrides: list[str], work: Path, steps: int, every: int, val_every: int, kills: list[str]
) -> tuple[list[str], str | None]:
    """Train both runs in `work`.

    Returns:
        The kills, which are fewer in a run without validation data, and the first difference between the runs, or None.

    Raises:
        ConfigError, RunError: a run failed.
    """
    from mmlab.training.resume_proof import results

    straight, killed = work / "straight", work / "killed"
    ours = [
        "logger=csv",
        f"trainer.max_steps={steps}",
        f"trainer.val_every={val_every}",
        "trainer.log_every_n_steps=1",
        f"callbacks.checkpoint.every_n_steps={every}",
    ]
    print(f"straight: {steps} steps", flush=True)
    _finish(_start([*overrides, *ours], straight), straight)
    if not any(name.startswith("val/") for row in results(straight)["metrics.csv"].values() for name in row):
        print("there is no validation to kill the run in", flush=True)
        kills = [kill for kill in kills if not kill.endswith("v")]
    for kill in kills:
        _finish(_start([*overrides, *ours], killed, kill), killed, -signal.SIGKILL)
        print(f"killed at {kill}; resuming", flush=True)
    _finish(_start([*overrides, *ours], killed), killed)
    return kills, compare(straight, killed)


def compare(straight: Path, killed: Path) -> str | None:
    """Return the first difference between two runs' batches, last checkpoints, or metrics and reports."""
    from mmlab.training.checkpoint_folder import newest_whole
    from mmlab.training.checkpoint_io import read
    from mmlab.training.resume_proof import difference, read_batches, results

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
    return difference(*states) or difference(results(straight), results(killed))


def _start(overrides: list[str], run: Path, kill: str | None = None) -> subprocess.Popen:
    moment = "kill_in_validation" if kill and kill.endswith("v") else "kill_at"
    ours = [
        f"run.dir={run}",
        "+callbacks.batch_log._target_=mmlab.training.resume_proof.BatchLog",
        f"+callbacks.batch_log.folder={run}",
        f"+callbacks.batch_log.{moment}={kill.removesuffix('v') if kill else 'null'}",
    ]
    run.mkdir(parents=True, exist_ok=True)
    log = (run / "output.log").open("a")
    # In its own session, so that the kill also ends ranks and data workers, as the failure of a node does.
    return subprocess.Popen(
        [*PYTHON, "-m", "mmlab.cli", "train", *overrides, *ours],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment(),
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
