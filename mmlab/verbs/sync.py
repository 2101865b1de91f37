"""Upload offline logs of runs to Weights & Biases, in chronological order."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mmlab.config.errors import ConfigError, RunError
from mmlab.runs.child import PYTHON, environment
from mmlab.runs.run import find_run

if TYPE_CHECKING:
    from mmlab.training.wandb_files import Segment

KEY = "WANDB_API_KEY"
QUIET_S = 60  # a running process writes more often than that


def main(argv: list[str]) -> int:
    """Push the named runs, or all below `--root`.

    Each start of a run is a segment of one W&B run. Steps that a later start repeated are first removed from the
    earlier segment, so that each step occurs once.

    Raises:
        ConfigError: no key in the environment, or no such run.
        RunError: a segment could not be pushed; the same command retries it.
    """
    parser = argparse.ArgumentParser("mmlab sync", description=__doc__)
    parser.add_argument("run", nargs="*", metavar="RUN", help="name or folder of a run (default: all below --root)")
    parser.add_argument("--root", default="runs", help="folder of the runs (default: runs)")
    args = parser.parse_args(argv)
    folders = [find_run(run, args.root) for run in args.run]
    if not args.run:
        folders = sorted({path.parent.parent for path in Path(args.root).glob("*/wandb/offline-run-*")})
    waiting = {folder: segments for folder in folders if (segments := unpushed(folder))}
    if not waiting:
        print("nothing to push")
        return 0
    if not os.environ.get(KEY):
        names = ", ".join(folder.name for folder in waiting)
        raise ConfigError(f"{KEY} is not set; it is needed to push {names}.")
    failed = [folder.name for folder, segments in waiting.items() if not push_run(folder, segments)]
    if failed:
        raise RunError(f"{', '.join(failed)} could not be pushed completely; the same command retries it.")
    return 0


def unpushed(folder: Path) -> "list[Segment]":
    """Return the offline segments of a run that are not pushed yet, in chronological order."""
    from mmlab.training.wandb_files import find_segments

    return [segment for segment in find_segments(folder) if not segment.synced]


def push_run(folder: Path, segments: "list[Segment]") -> bool:
    """Push a run's segments in order; returns False after the first failure, which leaves the rest for later.

    The last segment is also left for later if it may still be written to.
    """
    from mmlab.training.wandb_files import cut_overlaps

    if still_written(segments[-1]):
        print(f"{folder.name}: its last start is still running, or ended within the last minute; left for later")
        segments = segments[:-1]
    cut_overlaps(folder)
    for number, segment in enumerate(segments, 1):
        if fault := push(segment):
            print(f"{folder.name}: segment {number} of {len(segments)} failed: {fault}", file=sys.stderr)
            return False
    if segments:
        print(f"{folder.name}: {len(segments)} segment{'s' if len(segments) > 1 else ''} pushed as {segments[0].id}")
    return True


def still_written(segment: "Segment") -> bool:
    """Whether a process may be writing to the segment: it has no end, and the file is recent."""
    return not segment.ended and time.time() - segment.file.stat().st_mtime < QUIET_S


def push(segment: "Segment") -> str | None:
    """Let wandb push one segment and mark it as pushed; return the error, or None."""
    from mmlab.runs.redact import redact_text

    # The mode that kept the run offline would prevent the upload.
    env = {name: value for name, value in environment().items() if name != "WANDB_MODE"}
    command = [*PYTHON, "-m", "wandb", "sync", str(segment.file.parent.resolve())]
    # In a new folder: wandb writes its own logs to the working folder, and an empty entry of PYTHONPATH means it.
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(command, env=env, cwd=empty, capture_output=True, text=True, errors="replace")
    if segment.synced:
        return None
    lines = [line.removeprefix("wandb: ").strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines
    return redact_text(errors[-1]) if errors else f"wandb sync ended with {done.returncode}"
