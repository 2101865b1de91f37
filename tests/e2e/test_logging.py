"""The logs of a run: their content, resuming, and redaction of secrets."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmlab import cli
from mmlab.runs.metrics_table import read_table
from mmlab.training import mlflow_log
from mmlab.training.wandb_files import find_segments
from tests.tiny_shapes import make_shapes
from tests.tiny_wandb import history

SECRETS = {
    "WANDB_API_KEY": "5e5e5e5ewandb5e5e5e5e5e5e5e5e5e5e5e5e5e5",
    "HF_TOKEN": "hf_sentinelSentinelSentinel",
    "AWS_SECRET_ACCESS_KEY": "aws/Sentinel+Sentinel",
    "DB_PASSWORD": "pass-word-sentinel",
}
PRESET = """
# @package _global_
data: {global_batch: 4, micro_batch: 2}
trainer: {max_steps: 4, val_every: 2, precision: 32-true, log_every_n_steps: 1}
callbacks: {checkpoint: {every_n_steps: 2}, samples: {count: 2, max_new_tokens: 4}}
"""
MODEL = ("stage.init_from=[]", "debug=short", "trainer=cpu")
METRICS = ("train/loss", "train/lr", "train/grad_norm", "val/loss", "data/replaced", "perf/samples_per_s")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    make_shapes(folder / "data" / "shapes", train=16, val=4, size=64)
    (folder / "conf" / "debug").mkdir(parents=True)
    (folder / "conf" / "debug" / "short.yaml").write_text(PRESET.lstrip())
    return folder


@pytest.fixture(scope="module")
def secret_run(work) -> tuple[Path, str]:
    """A run with secrets in its environment and on its command line, as a process of its own."""
    command = [sys.executable, "-m", "mmlab.cli", "train", "experiment=llava/finetune_tiny", *MODEL]
    command += ["logger=wandb", "logger.offline=true", "run.name=secret"]
    command += [f"logger.tags=[tiny,'{SECRETS['DB_PASSWORD']}']", f"logger.entity={SECRETS['HF_TOKEN']}"]
    env = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return work / "runs" / "secret", done.stdout + done.stderr


def test_no_secret_is_written_to_a_file(secret_run):
    folder, output = secret_run
    files = [path for path in folder.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert {".wandb", ".pt", ".csv", ".yaml", ".log", ".safetensors", ".png"} <= kinds
    for name, secret in SECRETS.items():
        assert secret not in output, name
        # Compressed contents of images and checkpoints are not searched.
        assert [path for path in files if secret.encode() in path.read_bytes()] == [], name
        assert [path for path in folder.rglob("*") if secret in path.name] == [], name


def test_wandb_prints_nothing_offline(secret_run):
    folder, output = secret_run
    assert "wandb" not in output
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert not names & {"wandb-metadata.json", "requirements.txt", "output.log", "diff.patch"}


def test_the_offline_folder_is_complete(secret_run):
    folder, _ = secret_run
    (segment,) = find_segments(folder)
    assert segment.ended and segment.offline and segment.id.startswith("secret-")
    assert segment.config["run"]["name"] == "secret" and segment.config["optim"]["lr"]
    assert segment.config["data"]["global_batch"] == 4
    rows = history(folder)
    table = read_table(folder / "metrics.csv")
    assert list(rows) == [1, 2, 3, 4] == list(table)
    for step, row in rows.items():
        assert row["trainer/global_step"] == step
        missing = [name for name in METRICS if name not in row and (name != "val/loss" or step % 2 == 0)]
        assert missing == [], step
        assert {name: float(value) for name, value in table[step].items()} == {name: row[name] for name in table[step]}
    assert [step for step, row in rows.items() if "val/samples" in row] == [2, 4]
    sheet = rows[4]["val/samples_sheet"]["filenames"][0]
    assert Image.open(segment.file.parent / "files" / sheet).size == Image.open(folder / "samples" / "step-4.png").size
    table_file = segment.file.parent / "files" / rows[4]["val/samples"]["path"]
    shown = json.loads(table_file.read_text())
    assert shown["columns"] == ["picture", "key", "question", "answer", "prediction"] and len(shown["data"]) == 2


def train(work: Path, monkeypatch, *overrides: str) -> Path:
    monkeypatch.chdir(work)
    assert cli.main(["train", "experiment=llava/align_tiny", *MODEL, *overrides]) == 0
    return work / "runs" / next(o for o in overrides if o.startswith("run.name=")).partition("=")[2]


def test_a_resumed_run_logs_each_step_once_with_the_same_values(work, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    whole = train(work, monkeypatch, "logger=wandb", "run.name=whole")
    cut = whole.with_name("cut")
    # The state after a kill: the checkpoint is of step 2, steps 3 and 4 are logged already.
    shutil.copytree(whole, cut, symlinks=True)
    (cut / "done.json").unlink()
    shutil.rmtree(cut / "artifacts")
    shutil.rmtree(cut / "checkpoints" / "step-4")
    config = (cut / "config.yaml").read_text()
    (cut / "config.yaml").write_text(config.replace("runs/whole", "runs/cut").replace("name: whole", "name: cut"))
    train(work, monkeypatch, "logger=wandb", "run.name=cut")
    segments = find_segments(cut)
    assert list(segments[0].rows) == [1, 2, 3, 4] and min(segments[1].rows) in (2, 3)
    assert segments[0].id == segments[1].id
    tables = [untimed(read_table(run / "metrics.csv")) for run in (whole, cut)]
    assert tables[0] == tables[1] and list(tables[1]) == [1, 2, 3, 4]
    rows = history(cut)
    assert list(rows) == [1, 2, 3, 4]
    for step, row in tables[0].items():
        assert {name: rows[step][name] for name in row} == {name: float(value) for name, value in row.items()}


def untimed(table: dict[int, dict[str, str]]) -> dict[int, dict[str, str]]:
    return {step: {n: v for n, v in row.items() if not n.startswith("perf/")} for step, row in table.items()}


def test_without_wandb(work):
    code = (
        "import sys; from mmlab.cli import main; code = main(sys.argv[1:]); "
        "print('wandb' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    command = ["train", "experiment=llava/align_tiny", *MODEL, "logger=csv", "run.name=csv"]
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "False", done.stderr
    folder = work / "runs" / "csv"
    assert list(read_table(folder / "metrics.csv")) == [1, 2, 3, 4]
    assert (folder / "samples" / "step-4.png").exists() and not (folder / "wandb").exists()


def test_tensorboard_has_the_table_and_the_sheets(work, monkeypatch):
    folder = train(work, monkeypatch, "logger=tensorboard", "run.name=board")
    reader = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0})
    reader.Reload()
    table = read_table(folder / "metrics.csv")
    for name in METRICS:
        column = {step: float(row[name]) for step, row in table.items() if name in row}
        assert {event.step: event.value for event in reader.Scalars(name)} == pytest.approx(column, rel=1e-6), name
    sheets = {event.step: event.encoded_image_string for event in reader.Images("val/samples_sheet/0")}
    assert sorted(sheets) == [2, 4]
    for step, data in sheets.items():
        sheet = Image.open(folder / "samples" / f"step-{step}.png")
        assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == sheet.convert("RGB").tobytes()


def test_mlflow_has_the_table_and_the_sheets(work, monkeypatch):
    monkeypatch.setattr(mlflow_log, "URI", None)
    folder = train(work, monkeypatch, "logger=mlflow", "run.name=flow")
    client = mlflow.MlflowClient(f"sqlite:///{work}/runs/mlruns/mlflow.db")
    flow = client.get_run((folder / "mlflow_id").read_text().strip())
    assert flow.info.run_name == "flow" and flow.info.status == "FINISHED" and "optim/lr" in flow.data.params
    assert len(client.search_runs([flow.info.experiment_id])) == 1
    table = read_table(folder / "metrics.csv")
    for name in METRICS:
        column = [(step, float(row[name])) for step, row in table.items() if name in row]
        assert [(one.step, one.value) for one in client.get_metric_history(flow.info.run_id, name)] == column, name
    logged = work / "runs" / "mlruns" / flow.info.run_id / "artifacts"
    assert sorted(path.name for path in logged.glob("val/samples/*")) == ["step-2.json", "step-4.json"]
    (sheet,) = logged.glob("images/val~samples_sheet+step+4+*.png")
    assert Image.open(sheet).size == Image.open(folder / "samples" / "step-4.png").size


def test_without_any_logger(work, monkeypatch):
    folder = train(work, monkeypatch, "logger=none", "run.name=none")
    assert (folder / "done.json").exists() and not (folder / "metrics.csv").exists()
