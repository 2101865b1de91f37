"""How a run stands, as its folder and its lock show it."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmlab.config.errors import ConfigError, RunError, UserError
from mmlab.runs.disk import claim
from mmlab.runs.finished_runs import DONE, FAILED
from mmlab.runs.run import LOCK
from mmlab.runs.run_status import noting_failure, status_of


class Left(UserError):
    exit_code = 143


def fail(folder: Path, error: BaseException, recorded: bool = True) -> None:
    start: Any = SimpleNamespace(folder=folder, recorded=recorded)
    with pytest.raises(type(error)), noting_failure(start):
        raise error


def test_an_error_is_noted(tmp_path):
    fail(tmp_path, ValueError("no\nsuch sk-abcdefghijklmnopqrstuvwxyz"))
    assert json.loads((tmp_path / FAILED).read_text())["error"] == "ValueError: no such <redacted>"
    assert status_of(tmp_path) == "failed"
    fail(tmp_path, RunError("The loss is NaN at step 7."))
    assert json.loads((tmp_path / FAILED).read_text())["error"] == "The loss is NaN at step 7."
    fail(tmp_path, ConfigError("max_length is too short."))
    assert json.loads((tmp_path / FAILED).read_text())["error"] == "max_length is too short."
    (tmp_path / DONE).write_text("{}")
    assert status_of(tmp_path) == "finished"


@pytest.mark.parametrize("error", [Left("asked to exit"), KeyboardInterrupt(), SystemExit(1)])
def test_a_signal_is_no_failure(tmp_path, error):
    fail(tmp_path, error)
    assert not (tmp_path / FAILED).exists() and status_of(tmp_path) == "interrupted"


def test_a_start_that_is_refused_notes_nothing(tmp_path):
    fail(tmp_path, RunError("another seed"), recorded=False)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_running_while_a_process_holds_its_lock(tmp_path):
    (tmp_path / FAILED).write_text("{}")
    there, now = os.pipe()
    wait, end = os.pipe()
    if (child := os.fork()) == 0:
        held = claim(tmp_path / LOCK, "trains")
        os.write(now, b"1")
        os.close(end)
        os.read(wait, 1)
        os._exit(held.fileno() < 0)
    os.read(there, 1)
    assert status_of(tmp_path) == "running"
    os.close(end)
    os.waitpid(child, 0)
    assert status_of(tmp_path) == "failed"
    for pipe in (there, now, wait):
        os.close(pipe)
