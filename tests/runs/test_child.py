"""Child processes import nothing from the folder in which they run."""

import subprocess
from types import SimpleNamespace

import pytest

from mmlab.runs.child import environment
from mmlab.runs.sweep import launcher
from mmlab.runs.sweep.local import Processes
from mmlab.verbs import resume_check, sync

MODULES = ("click", "json", "random", "yaml", "torch", "mmlab")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with modules that say when they are imported."""
    for name in MODULES:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start_sync(folder):
    (folder / "wandb/offline-run-1").mkdir(parents=True)
    (folder / "wandb/offline-run-1/run-1.wandb").touch()
    sync.push(SimpleNamespace(file=folder / "wandb/offline-run-1/run-1.wandb", synced=False))  # type: ignore[arg-type]


def start_point(folder):
    point = SimpleNamespace(number=1, name="a", overrides=["--nothing"], record=lambda reason: None, failure=None)
    Processes(launcher.TRAIN, folder / "logs", lambda: None).run([point])  # type: ignore[list-item]


def start_check(folder):
    resume_check._start(["--nothing"], folder / "run").wait()


def start_grandchild(folder):
    subprocess.run([*launcher.TRAIN[:1], "-c", "import json"], env=environment(), check=True)


@pytest.mark.parametrize("start", [start_sync, start_point, start_check, start_grandchild])
def test_a_module_in_the_working_folder_is_not_imported(folder, start, monkeypatch):
    if start is start_sync:
        monkeypatch.setenv("PYTHONPATH", ":")  # as after PYTHONPATH=$PYTHONPATH:…
    start(folder)
    assert not (folder / "imported").exists()
