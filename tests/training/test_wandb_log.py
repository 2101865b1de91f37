"""wandb's logger, offline: what its files hold afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from mmlab.config.errors import ConfigError
from mmlab.training import wandb_log
from mmlab.training.config import WandbLogConfig
from mmlab.training.wandb_files import find_segments
from mmlab.training.wandb_log import WandbLog, run_id
from tests.fake_wandb import serve
from tests.tiny_wandb import history

CONFIG = "optim: {lr: 0.1}\ndata: {train: [{path: a}]}\n"


@pytest.fixture(autouse=True)
def no_account(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", wandb_log.DATA_DIR):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def logger(run: Path, **options) -> WandbLog:
    return WandbLog(WandbLogConfig(save_dir=str(run), name="llava-align", **options))


def log_steps(log: WandbLog, steps: range, scale: float = 1.0) -> None:
    """Log Lightning's steps, which count from 0."""
    for step in steps:
        log.log_metrics({"train/loss": step * scale, "epoch": 0}, step)


def test_everything_is_in_the_files(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", ModuleType("openai"))  # then wandb advertises Weave
    log = logger(run, group="sweep-1", job_type="align", tags=["tiny"], project="mine")
    log.log_graph(None)  # type: ignore[arg-type]
    (segment,) = find_segments(run)
    assert segment.config == {"optim": {"lr": 0.1}, "data": {"train": [{"path": "a"}]}}, "the config is there at once"
    log_steps(log, range(3))
    picture = Image.new("RGB", (8, 8), "red")
    log.log_table("val/samples", ["picture", "question"], [[picture, "what?"], [None, "why?"]], 3)
    log.log_pictures("val/sheet", [picture], 3)
    log.log_metrics({"val/loss": 5.0}, 2)
    log.finalize("success")
    rows = history(run)
    assert list(rows) == [1, 2, 3] and segment.id.startswith("llava-align-")
    last = rows[3]
    assert (last["train/loss"], last["val/loss"], last["trainer/global_step"]) == (2, 5, 3)
    files = segment.file.parent / "files"
    table = json.loads((files / last["val/samples"]["path"]).read_text())
    assert table["columns"] == ["picture", "question"] and [row[1] for row in table["data"]] == ["what?", "why?"]
    assert Image.open(files / last["val/sheet"]["filenames"][0]).size == (8, 8)
    assert any((run / "wandb" / "data").rglob("tmp*")), "the table's pictures lie with the run"
    assert wandb_log.DATA_DIR not in os.environ
    data = segment.file.read_bytes()
    assert all(word in data for word in (b"sweep-1", b"align", b"tiny", b"mine"))
    assert capsys.readouterr() == ("", "")
    assert (run / "metrics.csv").read_text().splitlines()[-1] == "3,2.0,5.0"


def test_a_restart_is_another_segment_of_the_same_run(run):
    first = logger(run)
    log_steps(first, range(6))
    first.finalize("failed")
    second = logger(run)
    log_steps(second, range(3, 8), scale=10)
    second.finalize("success")
    segments = find_segments(run)
    assert [list(segment.rows) for segment in segments] == [[1, 2, 3, 4, 5, 6], [4, 5, 6, 7, 8]]
    assert segments[0].id == segments[1].id
    assert [row["train/loss"] for row in history(run).values()] == [0, 1, 2, 30, 40, 50, 60, 70]


KILLED = """
import os, signal, sys
from mmlab.training.config import WandbLogConfig
from mmlab.training.wandb_log import WandbLog
log = WandbLog(WandbLogConfig(save_dir=sys.argv[1], name="llava-align"))
log.log_graph(None)
for step in range(int(sys.argv[2])):
    log.log_metrics({"train/loss": float(step)}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_kill_kept_from_wandb_is_made_up_for(run):
    subprocess.run([sys.executable, "-c", KILLED, str(run), "40"])
    (segment,) = find_segments(run)
    assert segment.config["optim"] == {"lr": 0.1} and not segment.ended
    assert len(segment.rows) < 40, "wandb had not written the last rows, or this test shows nothing"
    log = logger(run)
    log_steps(log, range(40, 42))
    log.finalize("success")
    rows = history(run)
    assert list(rows) == list(range(1, 43))
    assert [row["train/loss"] for row in rows.values()] == list(range(42))


@pytest.mark.parametrize("more", [0, 3])
def test_wandb_itself_is_killed(run, capsys, more):
    log = logger(run)
    log_steps(log, range(3))
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    (service,) = [pid for pid in children if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(service), signal.SIGKILL)
    time.sleep(0.5)
    log_steps(log, range(3, 3 + more))
    log.finalize("success")
    err = capsys.readouterr().err
    assert err.startswith("wandb stopped (") and err.count("\n") == 1
    assert list(history(run)) == list(range(1, 4 + more))


def test_online_the_server_keeps_what_it_has(run, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        for steps, scale in ((range(6), 1.0), (range(3, 8), 10.0)):
            log = logger(run, offline=False)
            log_steps(log, steps, scale)
            log.finalize("success")
    (rows,) = server.rows.values()
    assert [(row["_step"], row["train/loss"]) for row in rows.values()] == [
        *((step + 1, step) for step in range(6)),
        (7, 60),
        (8, 70),
    ]
    err = capsys.readouterr().err
    assert f"wandb: {server.url}/team/p/runs/llava-align-" in err and "WARNING" not in err
    assert not [path for path in run.rglob("*") if path.is_file() and b"0123456789" * 4 in path.read_bytes()]


def test_wandb_that_cannot_be_reached_is_no_reason_to_stop(run, capsys, monkeypatch):
    from wandb.errors import CommError

    def init(self, wandb):
        if not self.offline:
            raise CommError("no route to host")
        return WandbLog._made(self, wandb)  # type: ignore[attr-defined]

    monkeypatch.setattr(WandbLog, "_made", WandbLog._init, raising=False)
    monkeypatch.setattr(WandbLog, "_init", init)
    log = logger(run, offline=False)
    log_steps(log, range(1))
    log.finalize("success")
    assert "wandb cannot be reached (no route to host): logging offline" in capsys.readouterr().err
    assert list(history(run)) == [1]


def test_online_without_a_key_is_one_sentence(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run))  # no netrc
    with pytest.raises(ConfigError, match=r"wandb does not start: .*WANDB_API_KEY"):
        logger(run, offline=False).start()


def test_the_id_belongs_to_the_folder(tmp_path):
    made = run_id(tmp_path, "a name/with: signs")
    assert made.startswith("a-name-with-signs-") and run_id(tmp_path, "other") == made
    (tmp_path / "second").mkdir()
    assert run_id(tmp_path / "second", "a name/with: signs") != made


def test_secrets_among_the_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "sentinel-0123")
    log = WandbLog(
        WandbLogConfig(
            save_dir=str(tmp_path), entity="sentinel-0123", tags=["x", "sentinel-0123"], name="a-sentinel-0123"
        )
    )
    assert "sentinel-0123" not in str(log.arguments)
