"""How a run stands: finished, running, failed or interrupted."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmlab.config.errors import RunError, UserError
from mmlab.runs.disk import locked, write_json
from mmlab.runs.finished_runs import FAILED, finished
from mmlab.runs.ranks import rank
from mmlab.runs.redact import redact
from mmlab.runs.run import LOCK, Start

STATUS = ("running", "failed", "interrupted", "finished")


def status_of(folder: Path) -> str:
    """Return one of `STATUS`.

    A run is running if a process holds its lock, which is not seen on a file system without locks. It has failed if an
    error ended it, and is interrupted if a signal did: the same command resumes it.
    """
    if finished(folder):
        return "finished"
    if locked(folder / LOCK):
        return "running"
    return "failed" if (folder / FAILED).is_file() else "interrupted"


@contextmanager
def noting_failure(start: Start) -> Iterator[None]:
    """Write `failed.json` if an error ends the block, with its message; not if the run was asked to exit.

    A start that is refused before it trains changes nothing in the folder.
    """
    try:
        yield
    except Exception as error:
        if start.recorded and rank() == 0 and getattr(error, "exit_code", 1) < 128:  # above are those of signals
            with suppress(RunError):
                write_json(start.folder / FAILED, redact(_about(error)))
        raise


def _about(error: Exception) -> dict[str, Any]:
    text = " ".join(str(error).split())
    text = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "error": text}
