"""MLflow's logger: what its own client finds in the database afterwards."""

import json
import shutil
from pathlib import Path

import mlflow
import pytest
from PIL import Image

from mmlab.config.errors import ConfigError
from mmlab.runs.metrics_table import read_table
from mmlab.training import mlflow_log
from mmlab.training.config import MLflowLogConfig

RED = Image.new("RGB", (8, 6), "red")


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """A database with its tables, which take seconds to create."""
    folder = tmp_path_factory.mktemp("database")
    logger(folder / "run")
    return folder / "mlruns" / "mlflow.db"


@pytest.fixture
def run(tmp_path, database, monkeypatch) -> Path:
    monkeypatch.setattr(mlflow_log, "URI", None)
    (tmp_path / "mlruns").mkdir()
    shutil.copy(database, tmp_path / "mlruns")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("optim: {lr: 0.1}\ndata: {train: [{path: a}]}\n")
    return folder


def logger(run: Path, **options) -> mlflow_log.MLflowLog:
    return mlflow_log.MLflowLog(MLflowLogConfig(save_dir=str(run), name="llava-align", **options))


def log_steps(log: mlflow_log.MLflowLog, steps: range, scale: float = 1.0) -> None:
    """Log Lightning's steps, which count from 0."""
    for step in steps:
        log.log_metrics({"train/loss": step * scale, "epoch": 0}, step)


def log_samples(log: mlflow_log.MLflowLog, step: int) -> None:
    log.log_pictures("val/samples_sheet", [RED], step)
    log.log_table("val/samples", ["picture", "question"], [[RED, "what?"], [None, "how?"]], step)


def client(run: Path):
    return mlflow.MlflowClient(f"sqlite:///{run.parent}/mlruns/mlflow.db")


def run_id(run: Path) -> str:
    return (run / "mlflow_id").read_text().strip()


def history(run: Path, name: str = "train/loss") -> list[tuple[int, float]]:
    return [(one.step, one.value) for one in client(run).get_metric_history(run_id(run), name)]


def files(run: Path, folder: str) -> list[str]:
    return [Path(file.path).name for file in client(run).list_artifacts(run_id(run), folder)]


def test_everything_is_in_the_database(run):
    log = logger(run)
    log.log_graph(None)  # type: ignore[arg-type]
    (found,) = client(run).search_runs([str(log.experiment_id)])
    assert found.info.run_name == "llava-align" and found.info.status == "RUNNING"
    assert found.data.params == {"optim/lr": "0.1", "data/train/0/path": "a"}
    log_steps(log, range(2))
    log.log_metrics({"val/loss": 3.0}, 1)
    log_samples(log, 2)
    log.finalize("success")
    found = client(run).get_run(run_id(run))
    assert found.info.status == "FINISHED" and set(found.data.metrics) == {"train/loss", "val/loss"}
    assert history(run) == [(1, 0.0), (2, 1.0)] and history(run, "val/loss") == [(2, 3.0)]
    assert read_table(run / "metrics.csv") == {1: {"train/loss": "0.0"}, 2: {"train/loss": "1.0", "val/loss": "3.0"}}
    folder = run.parent / "mlruns" / run_id(run) / "artifacts"
    table = json.loads((folder / "val/samples/step-2.json").read_text())
    assert table["columns"] == ["picture", "question"] and [row[1] for row in table["data"]] == ["what?", "how?"]
    assert Image.open(folder / table["data"][0][0]["filepath"]).tobytes() == RED.tobytes()
    (sheet,) = folder.glob("images/val~samples_sheet+step+2+*.png")
    assert Image.open(sheet).tobytes() == RED.tobytes()
    assert (folder / "config.yaml").is_file()


def test_a_restart_continues_the_run_without_doubled_or_missing_steps(run):
    log = logger(run)
    log_steps(log, range(4))
    log_samples(log, 4)
    log.csv.log_metrics({"train/loss": 4.0}, 4)  # killed before MLflow had it
    first = run_id(run)
    log = logger(run)
    log_samples(log, 4)
    log_steps(log, range(2, 3), 10)  # trained again: the values that MLflow has stay
    log_steps(log, range(3, 7))
    log.finalize("success")
    assert run_id(run) == first and client(run).get_run(first).info.status == "FINISHED"
    assert history(run) == [(step + 1, float(step)) for step in range(7)]
    assert len(files(run, "images")) == 2 and files(run, "val/samples") == ["step-4.json"]  # each image has a thumbnail
    assert len(json.loads(next(run.parent.glob("mlruns/*/artifacts/val/samples/*")).read_text())["data"]) == 2


def test_a_run_that_was_deleted_is_logged_as_a_whole(run):
    log = logger(run)
    log_steps(log, range(3))
    first = run_id(run)
    client(run).delete_run(first)
    log_steps(logger(run), range(3, 4))
    assert run_id(run) != first and [step for step, _ in history(run)] == [1, 2, 3, 4]


def log_steps_in_vain(log: mlflow_log.MLflowLog, steps: range, monkeypatch) -> None:
    """Log steps while the server is away."""
    with monkeypatch.context() as away:
        away.setattr(log.experiment, "log_batch", lambda *args, **kwargs: 1 / 0)
        log_steps(log, steps)


def test_a_run_continues_while_mlflow_fails(run, monkeypatch, capsys):
    log = logger(run)
    log_steps(log, range(1))
    log_steps_in_vain(log, range(1, 3), monkeypatch)
    log_steps(log, range(3, 4))
    assert [step for step, _ in history(run)] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("MLflow failed (division by zero) and is tried again") == 2


def test_the_end_of_a_run_logs_what_a_server_that_was_away_lacks(run, monkeypatch, capsys):
    log = logger(run)
    log_steps(log, range(1))
    log_steps_in_vain(log, range(1, 6), monkeypatch)
    assert capsys.readouterr().err.count("MLflow failed") == mlflow_log.PATIENCE
    log_steps(log, range(6, 7))
    assert [step for step, _ in history(run)] == [1]
    log.finalize("success")
    assert [step for step, _ in history(run)] == [*range(1, 8)]


def test_no_password_of_a_git_remote_is_written(run, monkeypatch):
    tags = {"mlflow.source.git.repoURL": "https://me:hunter2hunter2@host.org/lab.git"}
    monkeypatch.setattr("mlflow.tracking.context.registry.resolve_tags", lambda own=None: {**tags, **(own or {})})
    log_steps(logger(run), range(1))
    assert client(run).get_run(run_id(run)).data.tags[next(iter(tags))] == "https://me:<redacted>@host.org/lab.git"


def test_an_unusable_address_is_one_sentence(run):
    with pytest.raises(ConfigError, match=r"MLflow does not start: .*; check logger.tracking_uri or MLFLOW_TRACKING"):
        logger(run, tracking_uri="file:mlruns")


def test_a_server_that_does_not_answer_is_one_sentence(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    log = logger(run, tracking_uri="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"MLflow does not start: .*; check logger.tracking_uri or MLFLOW_TRACKING"):
        hasattr(log, "experiment")  # as Lightning's setup does


def test_without_the_package_it_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_log, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logger=mlflow needs a package: pip install 'mmlab\[mlflow\]'\."):
        logger(tmp_path)
