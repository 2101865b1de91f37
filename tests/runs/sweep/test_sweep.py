"""Sweeps of stand-in runs: which points run, and what is printed and written."""

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from mmlab.config.compose import compose, hydra_verb
from mmlab.config.errors import RunError
from tests.runs.sweep.conftest import Sweep
from tests.runs.sweep.tiny_sweep import RECIPE


def started() -> list[list[str]]:
    """(run, sweep, learning rate) of each start of a point."""
    path = Path("started.txt")
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def folder() -> Path:
    (only,) = Path("runs/sweeps").iterdir()
    return only


def table() -> list[dict[str, str]]:
    return list(csv.DictReader((folder() / "table.csv").open()))


def test_a_point_of_a_grid_is_the_same_run_as_on_its_own(sweep: Sweep, tmp_path, capfd):
    assert sweep("optim.lr=1e-2,1e-3", "seed=1,2") == 0
    assert len(started()) == 4 and {name for _, name, _ in started()} == {folder().name}
    alone = compose("train", [RECIPE, "logger=none", "optim.lr=1e-3", "seed=2"], tmp_path / "tree").run.name
    rows = table()
    assert [row["optim.lr"] for row in rows] == ["0.001", "0.001", "0.01", "0.01"]
    assert [(row["run"], row["status"], row["steps"]) for row in rows if row["optim.lr"] + row["seed"] == "0.0012"] == [
        (alone, "complete", "2")
    ]
    assert [float(row["train/loss"]) for row in rows] == [1e-3, 1e-3, 1e-2, 1e-2]
    means = list(csv.DictReader((folder() / "means.csv").open()))
    assert [(row["optim.lr"], row["runs"]) for row in means] == [("0.001", "2"), ("0.01", "2")]
    assert Image.open(folder() / "table.png").width > 600
    assert capfd.readouterr().out.count(alone) == 2  # when it starts, and in the table
    assert not list(Path().rglob("multirun.yaml"))


def test_a_repeated_sweep_runs_only_failed_points(sweep: Sweep, capfd):
    Path("broken").touch()
    assert sweep("optim.lr=0.1,0.5,0.9") == 1
    out, err = capfd.readouterr()
    assert [lr for *_, lr in started()] == ["0.1", "0.5", "0.9"]
    assert [row["status"] for row in table()] == ["complete", "complete", "failed"]
    assert err.splitlines()[0] == "mmlab: The loss is not a number."
    last = err.splitlines()[-1]
    assert "1 of 3 points failed: llava-align_tiny-" in last and "(optim.lr=0.5); the same command runs only" in last
    assert "Traceback" not in out + err and "HYDRA" not in out + err
    Path("broken").unlink()
    assert sweep("optim.lr=0.1,0.5,0.9") == 0
    assert [lr for *_, lr in started()][3:] == ["0.5"]
    assert {row["status"] for row in table()} == {"complete"}
    assert sweep("optim.lr=0.1,0.5,0.9") == 0 and len(started()) == 4


def test_maximize_reverses_the_table(sweep: Sweep):
    assert sweep("optim.lr=0.1,0.3,0.2", "sweep.direction=maximize") == 0
    assert [row["optim.lr"] for row in table()] == ["0.3", "0.2", "0.1"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["optim.lr=0.1,-1"], "At sweep point optim.lr=-1: 'optim.lr' must be above 0"),
        (["optim.lrr=0.1,0.2"], "At sweep point optim.lrr=0.1: There is no key 'optim.lrr'. Did you mean 'lr'?"),
        (["model=llava,lava"], "At sweep point model=lava: Config group 'model' has no option 'lava'"),
        (["seed=1,2", "run.name=x"], "All points would be the run x"),
        (["data.workers=0,1"], "data.workers affects only how a run is executed"),
        (["optim.lr=interval(0.1,0.2)"], "search it with hydra/sweeper=optuna"),
        (["seed=1,2", "hydra/launcher=jobli"], "has no option 'jobli'. Did you mean 'joblib'?"),
        (["seed=1", "hydra/sweeper=optuna"], "There is nothing to search"),
        (["optim.lr=interval(2,1)", "hydra/sweeper=optuna"], "The search cannot start: The `low` value"),
        (["seed=1,2", "hydra.launcher._target_=os.system"], "'os.system' is not allowed"),
        (["seed=1,2", "sweep.metrik=x"], "'sweep.metrik'. Did you mean 'metric'?"),
    ],
)
def test_an_invalid_sweep_runs_nothing(sweep: Sweep, capfd, argv, sentence):
    assert sweep(*argv) == 2
    out, err = capfd.readouterr()
    assert sentence in err and len(err.splitlines()) == 1 and "Traceback" not in err, err
    assert (out == "" and not Path("runs").exists()) or not list(Path("runs/sweeps").iterdir())


def test_an_execution_key_can_be_swept_with_run_names(sweep: Sweep):
    assert sweep("data.workers=0,1", "run.name='w-${data.workers}'") == 0
    assert [name for name, *_ in started()] == ["w-0", "w-1"]


def test_a_micro_batch_of_compared_samples_can_be_swept(sweep: Sweep, tmp_path):
    stage = "defaults: [/schema/ContrastivePretrainingConfig@_here_, _self_]\ntrainable: [vision]\n"
    (tmp_path / "tree" / "stage" / "contrastive.yaml").write_text(stage)
    assert sweep("stage=contrastive", "data.micro_batch=2,4") == 0 and len(started()) == 2


def test_an_unknown_metric_is_refused(sweep: Sweep, capfd):
    assert sweep("seed=1,2", "sweep.metric=val/los") == 1
    assert "has no metric 'val/los'. Did you mean 'val/loss'?" in capfd.readouterr().err
    assert sweep("seed=1,2", "sweep.metric=val/loss") == 0 and len(started()) == 2


def test_joblib_runs_points_in_parallel_with_logs(sweep: Sweep, capfd):
    Path("broken").touch()
    argv = ("optim.lr=0.1,0.2,0.5", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert sweep(*argv) == 1
    failed = next(row["run"] for row in table() if row["status"] == "failed")
    assert f"mmlab: {failed} failed: The loss is not a number ({folder()}/logs/{failed}.log)" in capfd.readouterr().err
    Path("broken").unlink()
    assert sweep(*argv) == 0 and len(started()) == 4


def test_a_repeated_search_reuses_its_points(sweep: Sweep):
    argv = ("hydra/sweeper=optuna", "optim.lr=tag(log, interval(1e-4, 1e-2))")
    assert sweep(*argv, "hydra.sweeper.n_trials=2") == 0
    assert len(started()) == 2
    assert sweep(*argv, "hydra.sweeper.n_trials=3") == 0
    assert len(started()) == 3 and len(table()) == 3
    losses = [float(row["train/loss"]) for row in table()]
    assert losses == sorted(losses) and all(1e-4 <= loss <= 1e-2 for loss in losses)
    assert f"best_value: {losses[0]}" in (folder() / "optimization_results.yaml").read_text()


def test_a_failed_trial_has_no_value_and_fails_the_search(sweep: Sweep, capfd):
    Path("broken").touch()
    argv = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "optim.lr=choice(0.5,0.9)", "sweep.direction=maximize")
    assert sweep(*argv) == 1
    out, err = capfd.readouterr()
    assert "1 of 2 points failed" in err and "executing job" not in out + err and "Failed experiment" not in out + err
    assert "best_value: 0.9" in (folder() / "optimization_results.yaml").read_text()
    Path("broken").unlink()
    assert sweep(*argv) == 0
    assert sum(lr == "0.9" for *_, lr in started()) == 1
    assert sum(row["status"] == "complete" for row in table()) == 2


def test_too_many_failures_end_a_search(sweep: Sweep, capfd):
    Path("broken").touch()
    argv = ("hydra/sweeper=optuna", "optim.lr=choice(0.5)", "hydra.sweeper.n_trials=3")
    assert sweep(*argv, "hydra.sweeper.max_failure_rate=0.5") == 1 and len(started()) == 1
    assert capfd.readouterr().err.splitlines()[-1].endswith("failed: exit code 1.")
    # The plugin ends a grid differently if its last point fails.
    assert sweep(*argv, "hydra/sweeper/sampler=grid") == 1 and len(started()) == 2
    assert "1 of 1 points failed" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("signum", "seeds", "launcher"),
    [
        (signal.SIGINT, "1,7,9", ()),
        (signal.SIGTERM, "1,7,9", ()),
        (signal.SIGINT, "1,7", ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")),
    ],
)
def test_a_signal_reaches_the_point_once_and_ends_the_sweep(sweep: Sweep, signum, seeds, launcher):
    def send() -> None:
        end = time.monotonic() + 60
        while not (Path("waiting").exists() and list(Path("runs").glob("*/done.json"))) and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), signum)

    thread = threading.Thread(target=send)
    thread.start()
    before = signal.getsignal(signum)
    assert sweep(f"seed={seeds}", *launcher) == 128 + signum
    thread.join()
    assert signal.getsignal(signum) is before
    assert Path("saved").read_text() == str(int(signum))
    assert len(started()) == 2
    assert {row["seed"]: row["status"] for row in table()}.items() >= {"1": "complete", "7": "missing"}.items()


def test_no_secret_is_written_to_the_sweeps_folder(sweep: Sweep, monkeypatch, capfd):
    secret = f"sentinel-{time.time_ns()}"  # not in the code, whose uncommitted diff is in code.json
    monkeypatch.setenv("SOME_API_KEY", secret)
    assert sweep(f"stage.prompt.system={secret},other", f"data.root=/x/{secret}") == 0
    written = b"".join(path.read_bytes() for path in Path("runs").rglob("*") if path.is_file())
    assert secret.encode() not in written and b"redacted" in written
    assert secret not in capfd.readouterr().out


def test_a_sweep_is_locked_by_its_process(sweep: Sweep, capfd):
    assert sweep("seed=1,2") == 0
    script = "import sys; from mmlab.runs.disk import Path, claim; file = claim(Path(sys.argv[1]), ''); "
    script += "print('locked', flush=True); input()"
    command = [sys.executable, "-c", script, str(folder() / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"locked\n"
        capfd.readouterr()
        assert sweep("seed=1,2") == 1
        error = capfd.readouterr().err
        assert f"process {owner.pid} on " in error and f" is running the sweep in {folder()}; wait for it" in error
        owner.kill()


def test_other_verbs_run_their_points_in_this_process(sweep: Sweep, capfd, tmp_path):
    seen: list[int] = []

    def task(cfg) -> None:
        """Fail on one."""
        seen.append(cfg.seed)
        if cfg.seed == 2:
            raise RunError("No.")

    with pytest.raises(RunError, match="1 of 3 points failed"):
        hydra_verb("plan", task, ["-m", "--config-path", str(tmp_path / "tree"), RECIPE, "seed=1,2,3"])
    assert seen == [1, 2, 3] and capfd.readouterr().err == "mmlab: No.\n"
    assert not list(Path().iterdir())
