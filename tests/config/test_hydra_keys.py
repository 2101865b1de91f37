"""What a page or a command line may set under `hydra`."""

import os

import pytest

from mmlab import cli
from mmlab.config.compose import compose
from tests.config.tiny_conf import write_conf

RECIPE = "experiment=llava/align_tiny"
TOUCH = "{_target_: webdataset.gopen, url: 'pipe:touch ran', mode: rb}"
STREAM = "handlers: {h: {(): webdataset.gopen, url: 'pipe:touch ran', mode: rb}}"
PAGES = {
    "callbacks": f"callbacks: {{e: {TOUCH}}}",
    "callbacks.e": "callbacks: {e: '${callbacks.evil}'}",
    "job.env_set": "job: {env_set: {MMLAB_ALLOW_TARGETS: os}}",
    "job.env_": "job: {env_copy: [HOME]}",
    "job_logging": f"job_logging: {{version: 1, {STREAM}, root: {{handlers: [h]}}}}",
    "hydra_logging": f"hydra_logging: {{version: 1, {STREAM}}}",
    "launcher._target_": "launcher: {_target_: hydra_plugins.hydra_joblib_launcher.joblib_launcher.os.system}",
    "launcher.setup": "launcher: {setup: [touch ran]}",
    "launcher.python": "launcher: {python: touch}",
    "launcher.partition": 'launcher: {partition: "gpu\\ntouch ran"}',
    "launcher.additional_parameters": "launcher: {additional_parameters: {export: LD_PRELOAD=x}}",
    "sweeper._target_": "sweeper: {_target_: optuna.samplers.os.system}",
    "sweeper.storage": f"sweeper: {{storage: {TOUCH}}}",
    "sweeper.params": "sweeper: {params: '${callbacks.evil}'}",
    "overrides": "overrides: {hydra: ['hydra.launcher.setup=[touch ran]']}",
}
DATA = "{root: shapes, train: [{path: train}], val: [{path: val}], global_batch: 8, micro_batch: 4}"


@pytest.fixture
def conf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_conf(tmp_path / "tree")


@pytest.mark.parametrize("key", PAGES)
@pytest.mark.parametrize("page", ["experiment/llava/align_tiny", "data/shapes"])
def test_pages_build_and_run_nothing(conf, key, page, capsys):
    text = (conf / f"{page}.yaml").read_text()
    if page.startswith("data"):  # a page of a group reaches `hydra` only with another package
        text = f"# @package _global_\ndefaults: [/schema/ImageTextDataConfig@data, _self_]\ndata: {DATA}"
    (conf / f"{page}.yaml").write_text(f"{text}\ncallbacks: {{evil: {{a: {TOUCH}}}}}\nhydra:\n  {PAGES[key]}\n")
    for verb in (["train"], ["train", "-m", "seed=1,2"], ["train", "--cfg", "hydra"]):
        assert cli.main([*verb, RECIPE, "--config-path", str(conf)]) == 2, verb
        error = capsys.readouterr().err
        assert f"'hydra.{key}" in error and len(error.splitlines()) == 1, error
    assert not (conf.parent / "ran").exists() and "MMLAB_ALLOW_TARGETS" not in os.environ


@pytest.mark.parametrize(
    "override",
    [
        f"+hydra.callbacks.e={TOUCH}".replace("'pipe:touch ran'", "x"),
        "+hydra.job.env_set.A=b",
        "hydra.launcher._target_=os.system",
        "hydra.searchpath=[pkg://antigravity]",
        "hydra.job_logging.handlers.console.class=os.system",
        "hydra/launcher=mine",
        "hydra.output_subdir=../x",
        "hydra/sweeper=optuna & hydra.sweeper.sampler._target_=optuna.samplers.os.system",
    ],
)
def test_neither_does_the_command_line_or_a_folder_of_the_user(conf, override, capsys):
    mine = conf.parent / "conf/hydra/launcher"
    mine.mkdir(parents=True)
    (mine / "mine.yaml").write_text("_target_: os.system\ncommand: touch ran\n")
    assert cli.main(["train", RECIPE, *override.split(" & "), "--config-path", str(conf), "--config-dir", "conf"]) == 2
    assert "hydra." in capsys.readouterr().err


def test_a_page_cannot_import_a_package_to_look_for_configs(conf, capsys):
    root = (conf / "train.yaml").read_text().replace("hydra:\n", "hydra:\n  searchpath: [pkg://antigravity]\n", 1)
    (conf / "root.yaml").write_text(root)
    assert cli.main(["train", RECIPE, "--config-path", str(conf), "--config-name", "root"]) == 2
    assert "pkg://antigravity" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides",
    [
        ["hydra.run.dir=x", "hydra.job.name=y", "hydra.verbose=true", "hydra.sweep.subdir=z", "hydra.mode=RUN"],
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=8"],
        ["hydra/launcher=slurm", "hydra.launcher.setup=[module load cuda]"],
        ["hydra/launcher=slurm", "+hydra.launcher.additional_parameters.mail-type=END"],
        ["hydra/launcher=submitit_local"],
        ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra/sweeper/sampler=grid"],
        ["hydra/sweeper=optuna", "hydra/sweeper/sampler=cmaes", "hydra.sweeper.storage=sqlite:///study.db"],
        ["hydra/job_logging=stdout", "hydra/hydra_logging=disabled"],
    ],
)
def test_what_users_need_stays_possible(overrides):
    compose("train", [RECIPE, *overrides])


def test_folders_on_the_search_path_stay_possible(conf, tmp_path):
    (tmp_path / "more/optim").mkdir(parents=True)
    page = "defaults: [/schema/AdamWConfig@_here_, _self_]\nweight_decay: 0.5\n"
    (tmp_path / "more/optim/slow.yaml").write_text(page)
    cfg = compose("train", [RECIPE, f"hydra.searchpath=[file://{tmp_path}/more]", "optim=slow"], conf)
    assert cfg.optim.weight_decay == 0.5
