"""`mmlab train -m` with real trainings."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmlab import cli
from tests.tiny_shapes import make_shapes

POINT = (
    *("experiment=llava/language_tiny", "trainer=cpu", "trainer.precision=32-true", "trainer.max_steps=2"),
    *("trainer.limit_val_batches=0", "data.global_batch=4", "data.micro_batch=2", "logger=none"),
)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    make_shapes(folder / "data" / "shapes", train=12, val=4)
    return folder


def light(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that prints its heavy imports as its last line."""
    code = (
        "import sys; from mmlab.cli import main; code = main(sys.argv[1:]); "
        "print(sorted({'torch', 'lightning', 'transformers', 'wandb'} & set(sys.modules))); sys.exit(code)"
    )
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)


def test_points_are_trained_as_runs_by_a_parent_without_torch(work, monkeypatch, capfd):
    monkeypatch.chdir(work)
    ddp = light("train", "-m", *POINT, "optim.lr=1e-3", "trainer.devices=2", "trainer.strategy=ddp", "run.sweep=mine")
    assert ddp.returncode == 0, ddp.stdout + ddp.stderr
    done = light("train", "-m", *POINT, "optim.lr=1e-3,1e-2", "run.sweep=mine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sweep mine: 2 points, 1 of them complete already" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    (folder,) = Path("runs/sweeps").iterdir()
    rows = list(csv.DictReader((folder / "table.csv").open()))
    for row in rows:
        ended = json.loads(Path("runs", row["run"], "done.json").read_text())
        assert (row["status"], ended["steps"], ended["train/loss"]) == ("complete", 2, float(row["train/loss"]))
    losses = [float(row["train/loss"]) for row in rows]
    assert len(rows) == 2 and losses == sorted(losses)
    # Outside the sweep, with another spelling of the number, a point is the same run.
    assert cli.main(["train", *POINT, "optim.lr=0.01"]) == 0
    assert " is complete: " in capfd.readouterr().out


def test_all_points_are_checked_thoroughly_before_the_first_runs(work, monkeypatch):
    monkeypatch.chdir(work)
    before = sorted(Path("runs").rglob("*"))
    done = light("train", "-m", *POINT, "data.root=data/shapes,data/shaps")
    assert (done.returncode, done.stdout) == (2, "[]\n"), done.stderr
    assert (
        "At sweep point data.root=data/shaps: 'data.train.0.path': there is no folder data/shaps/train." in done.stderr
    )
    assert sorted(Path("runs").rglob("*")) == before
