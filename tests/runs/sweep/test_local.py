"""Processes on this machine: their shares of CPUs and GPUs, and the reason why one ended."""

import sys
from pathlib import Path

import pytest

from mmlab.runs.sweep.local import Processes, divide
from mmlab.runs.sweep.points import Point


@pytest.mark.parametrize(
    ("visible", "jobs", "shares"),
    [
        ("0,1,2,3", 2, ["0,2", "1,3"]),
        ("4,5", 2, ["4", "5"]),
        ("0,1", 4, [None] * 4),  # fewer than processes: each uses all
        ("", 2, [None] * 2),
    ],
)
def test_gpus_are_divided(monkeypatch, visible, jobs, shares):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [share.get("CUDA_VISIBLE_DEVICES") for share in divide(jobs)] == shares


def test_threads_are_divided_unless_they_are_set(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("mmlab.runs.sweep.local._cpus", lambda: 9)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert divide(2) == [{"OMP_NUM_THREADS": "4"}] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert divide(2) == [{}, {}]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('mmlab: The data is gone.'); raise SystemExit(1)", "The data is gone"),
        ("raise ValueError('odd')", "exit code 1, ValueError: odd"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("raise SystemExit(143)", "ended by SIGTERM"),
        ("pass", "it ended without being complete"),
    ],
)
def test_a_failure_has_a_reason(tmp_path: Path, code, reason):
    points = [Point([], {}, name, tmp_path / name) for name in ("a", "b")]
    ended: list[int] = []
    processes = Processes([sys.executable, "-c", code], tmp_path, lambda: ended.append(1), jobs=2)
    processes.run(points)
    assert [point.failure for point in points] == [reason] * 2 and len(ended) == 2
    assert all(point.status == "failed" for point in points)
