"""A fixture that runs `mmlab train -m` in a fresh folder, with a tiny config and a stand-in for training."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mmlab
from mmlab import cli
from mmlab.runs.sweep import launcher, points
from tests.config.tiny_conf import write_conf
from tests.runs.sweep.tiny_sweep import RECIPE

Sweep = Callable[..., int]


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Sweep:
    """Run a sweep in a fresh folder and return its exit code."""
    tree = write_conf(tmp_path / "tree")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert mmlab.__file__ is not None
    monkeypatch.setenv("PYTHONPATH", str(Path(mmlab.__file__).parent.parent))
    monkeypatch.setattr(launcher, "TRAIN", (sys.executable, "-m", "tests.runs.sweep.tiny_sweep"))
    # There is no data; skipping the checks also avoids importing torch.
    monkeypatch.setattr(points, "check_in_subprocess", lambda configs: None)
    return lambda *argv: cli.main(["train", "-m", "--config-path", str(tree), RECIPE, "logger=none", *argv])
