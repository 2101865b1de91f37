"""Push what runs logged offline to Weights & Biases, in order of time."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mmlab.config.errors import ConfigError, RunError
from mmlab.runs.run import find_run

if TYPE_CHECKING:
    from mmlab.training.wandb_files import Segment

KEY = "WANDB_API_KEY"
QUIET_S = 60  # a running start writes more often than that


def main(argv: list[str]) -> int:
    """Push the named runs, or all below `--root`, one after another.

    A run's starts are segments of one run there. Where a later one trained steps again, they are cut from
    the earlier one first, so that each step is there once.

    Raises:
        ConfigError: no key in the environment, or no such run.
        RunError: something could not be pushed; the same command goes on with it.
    """
    parser = argparse.ArgumentParser("mmlab sync", description=__doc__)
    parser.add_argument("run", nargs="*", metavar="RUN", help="name or folder of a run; none: all below --root")
    parser.add_argument("--root", default="runs", help="where the runs lie (default: runs)")
    args = parser.parse_args(argv)
    folders = [find_run(run, args.root) for run in args.run]
    if not args.run:
        folders = sorted({path.parent.parent for path in Path(args.root).glob("*/wandb/offline-run-*")})
    waiting = {folder: found for folder in folders if (found := unpushed(folder))}
    if not waiting:
        print("nothing to push")
        return 0
    if not os.environ.get(KEY):
        names = ", ".join(folder.name for folder in waiting)
        raise ConfigError(f"{KEY} is not in the environment; it is needed to push {names}.")
    failed = [folder.name for folder, segments in waiting.items() if not push_run(folder, segments)]
    if failed:
        raise RunError(f"not all of {', '.join(failed)} could be pushed; the same command goes on with it.")
    return 0


def unpushed(folder: Path) -> "list[Segment]":
    """Return the offline segments of a run that are still to be pushed, in order of time."""
    from mmlab.training.wandb_files import find_segments

    return [segment for segment in find_segments(folder) if not segment.synced]


def push_run(folder: Path, segments: "list[Segment]") -> bool:
    """Push a run's segments in order; False where one failed, and those after it wait.

    The last one waits too while it is being written.
    """
    from mmlab.training.wandb_files import cut_overlaps

    if still_written(segments[-1]):
        print(f"{folder.name}: its last start is still running, or was until a minute ago; it is left for later")
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
    """Whether a process may be writing to the segment: it has not ended, and the file is fresh."""
    return not segment.ended and time.time() - segment.file.stat().st_mtime < QUIET_S


def push(segment: "Segment") -> str | None:
    """Let wandb push one segment, which marks it; return what went wrong, or None."""
    from mmlab.runs.redact import redact_text

    # A mode that kept the run offline would keep its segments here.
    env = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    folder = segment.file.parent.resolve()
    command = [sys.executable, "-m", "wandb", "sync", str(folder)]
    # From the run's folder: wandb leaves logs of its own in `wandb/` where it is called.
    done = subprocess.run(command, env=env, cwd=folder.parent.parent, capture_output=True, text=True, errors="replace")
    if segment.synced:
        return None
    said = [line.removeprefix("wandb: ").strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in said if "error" in line.lower()] or said
    return redact_text(errors[-1]) if errors else f"wandb sync ended with {done.returncode}"
