"""Pushing offline runs: which, in which order, without repeated steps, and with which messages."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmlab import cli
from mmlab.verbs import sync
from tests.fake_wandb import serve
from tests.tiny_wandb import write_segment


@pytest.fixture(autouse=True)
def account(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def pushed(monkeypatch) -> list[str]:
    """Calls of wandb's command, which marks the segment; a folder that contains `broken` fails."""
    calls: list[str] = []

    def run(command, env, **options):
        folder = Path(command[-1])
        assert command[1:5] == ["-P", "-m", "wandb", "sync"] and "WANDB_MODE" not in env
        calls.append("/".join(folder.parts[-3:]))
        if (folder / "broken").exists():
            return SimpleNamespace(stdout="", stderr="wandb: ERROR no such entity\nwandb: bye\n", returncode=0)
        (file,) = folder.glob("*.wandb")
        file.with_suffix(".wandb.synced").touch()
        return SimpleNamespace(stdout="", stderr="", returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def make_run(name: str, *segments: tuple[int, range], ended: bool = True) -> Path:
    folder = Path("runs", name)
    for started, steps in segments:
        write_segment(folder, started, {step: {"loss": 1.0 / step} for step in steps}, ended)
    (folder / "config.yaml").touch()
    return folder


def test_in_order_of_time_and_once(pushed, capsys):
    make_run("b", (30, range(1, 5)), (10, range(1, 3)))
    make_run("a", (20, range(1, 3)))
    assert cli.main(["sync"]) == 0
    first = ["a/wandb/offline-run-20-r-1", "b/wandb/offline-run-10-r-1", "b/wandb/offline-run-30-r-1"]
    assert pushed == first
    assert capsys.readouterr().out.splitlines() == ["a: 1 segment pushed as r-1", "b: 2 segments pushed as r-1"]
    assert cli.main(["sync"]) == 0
    assert pushed == first and capsys.readouterr().out == "nothing to push\n"


def test_named_runs_only(pushed, capsys):
    make_run("a", (1, range(1, 3)))
    make_run("b", (1, range(1, 3)))
    assert cli.main(["sync", "b"]) == 0
    assert pushed == ["b/wandb/offline-run-1-r-1"]
    capsys.readouterr()
    assert cli.main(["sync", "c"]) == 2
    assert "There is no run 'c' in runs." in capsys.readouterr().err


def test_after_a_failure_the_rest_of_the_run_waits(pushed, capsys):
    a = make_run("a", (1, range(1, 3)), (2, range(3, 5)))
    make_run("b", (1, range(1, 3)))
    (a / "wandb" / "offline-run-1-r-1" / "broken").touch()
    assert cli.main(["sync"]) == 1
    assert pushed == ["a/wandb/offline-run-1-r-1", "b/wandb/offline-run-1-r-1"]
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "a: segment 1 of 2 failed: ERROR no such entity"
    assert err[1] == "mmlab: a could not be pushed completely; the same command retries it."


def test_without_a_key(pushed, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    assert cli.main(["sync"]) == 0
    make_run("a", (1, range(1, 3)))
    capsys.readouterr()
    assert cli.main(["sync"]) == 2 and pushed == []
    assert capsys.readouterr().err == "mmlab: WANDB_API_KEY is not set; it is needed to push a.\n"


def test_a_running_start_is_left_alone(pushed, capsys):
    folder = make_run("a", (1, range(1, 3)), (2, range(3, 5)), ended=False)
    assert cli.main(["sync"]) == 0
    assert pushed == ["a/wandb/offline-run-1-r-1"] and "still running" in capsys.readouterr().out
    file = folder / "wandb" / "offline-run-2-r-1" / "run-r-1.wandb"
    long_ago = file.stat().st_mtime - 2 * sync.QUIET_S
    os.utime(file, (long_ago, long_ago))
    assert cli.main(["sync"]) == 0
    assert pushed[1:] == ["a/wandb/offline-run-2-r-1"]


def test_a_server_has_every_step_once(monkeypatch, capsys):
    """wandb's own command, against a stand-in for its server: three starts, two of them cut off."""
    make_run("a", (10, range(1, 7)), (20, range(4, 9)), (30, range(9, 12)))
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        code = cli.main(["sync"])
    assert code == 0, capsys.readouterr().err
    rows = server.rows["r-1"]
    assert [rows[line]["_step"] for line in range(11)] == list(range(1, 12)) and len(rows) == 11
    assert [rows[line]["loss"] for line in range(11)] == [1 / step for step in range(1, 12)]
    assert [path.name for path in Path().iterdir()] == ["runs"], "wandb's own logs lie with the run"
    assert not [path for path in Path().rglob("*") if path.is_file() and b"0123456789" * 4 in path.read_bytes()]
    assert '"lr":0.1' in server.configs["r-1"].replace(" ", "")
