"""The table of a run's metrics."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmlab.runs.metrics_table import read_table
from mmlab.training.config import CSVLogConfig
from mmlab.training.csv_log import CSVLog


def lines(folder) -> list[str]:
    return (folder / "metrics.csv").read_text().splitlines()


def test_a_step_is_one_row_and_is_written_at_once(tmp_path):
    log = CSVLog(CSVLogConfig(save_dir=str(tmp_path)))
    log.log_metrics({"train/loss": 2.0, "epoch": 0}, 0)
    assert lines(tmp_path) == ["step,train/loss", "1,2.0"]
    log.log_metrics({"train/loss": 0.1 + 0.2}, 1)
    log.log_metrics({"val/loss": 3.0, "epoch": 0}, 1)
    assert lines(tmp_path) == ["step,train/loss,val/loss", "1,2.0,", "2,0.30000000000000004,3.0"]
    log.log_metrics({"train/loss": float("nan"), "val/loss": 1.0}, 2)
    log.log_metrics({"val/loss": 4.0}, 2)
    assert lines(tmp_path)[2:] == ["2,0.30000000000000004,3.0", "3,nan,4.0"]


def test_a_restart_replaces_what_is_trained_again(tmp_path):
    first = CSVLog(CSVLogConfig(save_dir=str(tmp_path)))
    for step in range(6):
        first.log_metrics({"a": float(step)}, step)
    again = CSVLog(CSVLogConfig(save_dir=str(tmp_path)))
    again.log_metrics({"b": 7.0}, 2)  # a validation of the step that was saved
    assert lines(tmp_path) == ["step,a,b", "1,0.0,", "2,1.0,", "3,2.0,7.0"]
    again.log_metrics({"a": 30.0}, 3)
    assert read_table(tmp_path / "metrics.csv") == {
        1: {"a": "0.0"},
        2: {"a": "1.0"},
        3: {"a": "2.0", "b": "7.0"},
        4: {"a": "30.0"},
    }


def test_a_table_in_another_order_keeps_one_row_for_each_step(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a\n3,2.0\n1,0.0\n2,1.0\n")
    log = CSVLog(CSVLogConfig(save_dir=str(tmp_path)))
    log.log_metrics({"a": 2.5}, 2)
    log.log_metrics({"a": 3.0}, 3)
    assert lines(tmp_path) == ["step,a", "1,0.0", "2,1.0", "3,2.5", "4,3.0"]


def test_a_line_that_a_kill_left_half_written_is_dropped(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a,b\n1,1.0,\n2,2.0,5.0\n3,3.")
    log = CSVLog(CSVLogConfig(save_dir=str(tmp_path)))
    log.log_metrics({"a": 3.5}, 2)
    assert lines(tmp_path) == ["step,a,b", "1,1.0,", "2,2.0,5.0", "3,3.5,"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_the_trainer_knows_the_step_better(tmp_path):
    """Lightning's own count is one ahead where only a validation is made up for."""
    log = CSVLog(CSVLogConfig(save_dir=str(tmp_path)))
    module: Any = SimpleNamespace(trainer=SimpleNamespace(global_step=12, fit_loop=SimpleNamespace(began_at=4)))
    log.log_graph(module)
    log.log_metrics({"val/loss": 1.0}, 12)
    assert list(log.rows) == [12]


def test_nothing_logged_is_no_row(tmp_path):
    log = CSVLog(CSVLogConfig(save_dir=str(tmp_path)))
    log.log_metrics({"epoch": 0}, 5)
    assert log.last_step == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "step,a\n"])
def test_a_table_without_rows(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    log = CSVLog(CSVLogConfig(save_dir=str(tmp_path)))
    log.log_metrics({"a": 1.0}, 0)
    assert lines(tmp_path) == ["step,a", "1,1.0"]


def test_the_row_that_a_run_resumes_from_only_gains_values(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a,b\n3,1.0,\n4,2.0,\n5,2.0,3.0\n")
    log = CSVLog(CSVLogConfig(save_dir=str(tmp_path)))
    trainer = SimpleNamespace(global_step=4, fit_loop=SimpleNamespace(began_at=4))
    module: Any = SimpleNamespace(trainer=trainer)
    log.log_graph(module)
    log.log_metrics({"a": 7.0, "b": 8.0}, 3)
    assert lines(tmp_path) == ["step,a,b", "3,1.0,", "4,2.0,8.0"]
    trainer.global_step = 5
    log.log_metrics({"a": 7.0}, 4)
    assert lines(tmp_path)[3:] == ["5,7.0,"]


@pytest.mark.parametrize(
    ("old", "new", "steps"),
    [
        (b"2,0.5", b"2,0.\xff", [1, 3]),
        (b"2,0.5", b"\xff\xfe", [1, 3]),
        (b"2,0.5", b"2,0.5,7", [1, 3]),
        (b"2,0.5", b"2\x00,0.5", [1, 3]),
        (b"2,0.5", b"", [1, 3]),
        (b"step", b"st\xffp", []),
    ],
)
def test_a_damaged_table_does_not_block_a_resume(tmp_path, capsys, old, new, steps):
    path, whole = tmp_path / "metrics.csv", b"step,loss\n1,0.75\n2,0.5\n3,0.25\n"
    path.write_bytes(whole.replace(old, new))
    log = CSVLog(CSVLogConfig(save_dir=str(tmp_path)))
    log.add({"loss": 0.125}, 4)
    assert list(read_table(path)) == [*steps, 4]
    assert "metrics.csv.damaged" in capsys.readouterr().err
    assert (tmp_path / "metrics.csv.damaged").read_bytes() == whole.replace(old, new)


def test_a_full_disk_does_not_end_the_training(tmp_path, capsys, monkeypatch):
    log = CSVLog(CSVLogConfig(save_dir=str(tmp_path)))
    log.add({"loss": 0.75}, 1)
    with monkeypatch.context() as patch:
        for name in ("_write_last", "_write_all"):
            patch.setattr(log, name, lambda *_: Path("/dev/full").write_text("x"))
        log.add({"loss": 0.5}, 2)
        log.add({"loss": 0.5, "other": 1.0}, 3)
    assert capsys.readouterr().err.count("metrics.csv cannot be written: the disk is full") == 2
    log.add({"loss": 0.25}, 4)
    assert list(read_table(tmp_path / "metrics.csv")) == [1, 2, 3, 4]
