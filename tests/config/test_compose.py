"""Composition: schemas, names, flags, search path, sweeps."""

import pytest
from omegaconf import OmegaConf

from mmlab.config.compose import compose, hydra_verb
from mmlab.config.errors import ConfigError, RunError
from mmlab.config.multirun import run_in_turn
from mmlab.model.config import MLPConnectorConfig, VisionEncoderConfig
from mmlab.verbs.config import TrainConfig
from tests.config.tiny_conf import write_conf

RECIPE = "experiment=llava/align_tiny"


@pytest.fixture
def conf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_conf(tmp_path / "tree")


def test_every_section_keeps_its_dataclass(conf):
    cfg = compose("train", [RECIPE], conf)
    assert OmegaConf.get_type(cfg) is TrainConfig
    assert OmegaConf.get_type(cfg.model.vision) is VisionEncoderConfig
    assert OmegaConf.get_type(cfg.model.connector) is MLPConnectorConfig
    assert (cfg.optim.lr, cfg.trainer.max_steps, cfg.model.connector.depth) == (2e-3, 4, 3)
    assert cfg.data.seed == cfg.seed


def test_swapping_a_part_swaps_its_dataclass(conf):
    cfg = compose("train", [RECIPE, "model/connector=linear"], conf)
    assert "depth" not in cfg.model.connector


def test_debug_presets_override_the_recipe(conf):
    assert compose("train", [RECIPE, "debug=fast"], conf).trainer.max_steps == 2
    overfit = compose("train", [RECIPE, "debug=overfit"], conf).trainer
    assert overfit.overfit and overfit.limit_val_batches == 0
    assert compose("train", [RECIPE, "debug=profile"], conf).trainer.profile == "simple"


def test_wandb_is_offline_without_a_key(conf, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert compose("train", [RECIPE, "logger=wandb"], conf).logger.offline is True
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    cfg = compose("train", [RECIPE, "logger=wandb"], conf)
    assert cfg.logger.offline is False
    assert (cfg.logger.name, cfg.logger.job_type) == ("llava-align_tiny", "align")
    assert cfg.logger.tags == ["llava/align_tiny", "llava", "shapes"]
    assert "0123456789abcdef" not in OmegaConf.to_yaml(cfg, resolve=True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert compose("train", [RECIPE, "logger=wandb"], conf).logger.offline is True


def test_a_task_gets_the_config_and_hydra_creates_no_folder(conf, tmp_path):
    seen = []
    code = hydra_verb("train", seen.append, ["--config-path", str(conf), RECIPE, "seed=3"])
    assert code == 0 and seen[0].seed == 3 and "hydra" not in seen[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("where", ["run.root=new/runs", "run.dir=new/a/b", "run.name=new/c"])
def test_a_task_that_fails_raises_its_error_and_leaves_no_folder(conf, tmp_path, capsys, where):
    def task(cfg):
        raise RunError("The loss is not a number.")

    with pytest.raises(RunError, match="not a number"):
        hydra_verb("train", task, ["--config-path", str(conf), RECIPE, where])
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]
    assert capsys.readouterr().err == ""


def test_multirun_names_each_point(conf):
    names = []
    argv = ["-m", "--config-path", str(conf), RECIPE, "optim.lr=1e-3,1e-2", "seed=0"]
    hydra_verb("train", lambda cfg: names.append((cfg.run.name, cfg.optim.lr)), argv)
    assert [lr for _, lr in names] == [1e-3, 1e-2]
    assert len({name for name, _ in names}) == 2


@pytest.mark.parametrize("points", [["seed=0,1"], ["seed=0"]])
@pytest.mark.parametrize("page", [True, False])
def test_a_page_or_an_override_can_ask_for_a_sweep(conf, page, points):
    """Without `-m`; a run would refuse two seeds."""
    if page:
        file = conf / "experiment" / "llava" / "align_tiny.yaml"
        file.write_text(f"{file.read_text()}hydra: {{mode: MULTIRUN}}\n")
    seeds, sweeps = [], []

    def in_turn(multirun, task):
        sweeps.append(multirun)
        run_in_turn(multirun, task)

    argv = ["--config-path", str(conf), RECIPE, *points, *([] if page else ["hydra.mode=MULTIRUN"])]
    hydra_verb("train", lambda cfg: seeds.append(str(cfg.seed)), argv, in_turn)
    assert ",".join(seeds) == points[0].partition("=")[2] and len(sweeps) == 1


def test_multirun_refuses_an_invalid_point(conf):
    argv = ["-m", "--config-path", str(conf), RECIPE, "optim.lr=1e-3,-1"]
    with pytest.raises(ConfigError, match=r"'optim.lr' must be above 0, not -1.0"):
        hydra_verb("train", lambda cfg: None, argv)


def test_conf_of_the_working_folder_and_config_dir_add_options(conf, tmp_path):
    for folder in ("conf", "mine"):
        (tmp_path / folder / "stage").mkdir(parents=True)
        text = "defaults: [/schema/ProjectorAlignmentConfig@_here_, _self_]\ntrainable: [vision]\n"
        (tmp_path / folder / "stage" / f"of_{folder}.yaml").write_text(text)
    seen = []
    base = ["model/vision=clip_tiny", "model/language=llama_tiny"]
    try:
        hydra_verb("train", seen.append, ["model=llava", "data=shapes", "stage=of_conf", *base])
        hydra_verb("train", seen.append, ["model=llava", "stage=of_mine", "data=shapes", *base, "-cd", "mine"])
    except ConfigError as error:  # the shipped options are not the point here
        pytest.fail(str(error))
    assert [cfg.run.name.split("-")[1] for cfg in seen] == ["of_conf", "of_mine"]


def test_cfg_and_help_show_missing_choices(conf, capsys):
    def task(cfg):
        """Train something."""
        pytest.fail("ran")

    assert hydra_verb("train", task, ["--config-path", str(conf), "--help"]) == 0
    text = capsys.readouterr().out
    assert "Train something." in text and "\nGroups: " in text
    assert hydra_verb("train", task, ["--config-path", str(conf), "--help", "keys"]) == 0
    assert "\nmodel: ???\n" in capsys.readouterr().out
    assert hydra_verb("train", task, ["--config-path", str(conf), RECIPE, "--cfg", "job"]) == 0
    assert "name: llava-align_tiny" in capsys.readouterr().out


def test_hydra_full_error_raises_the_original_exception(conf, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="Could not override") as error:
        compose("train", [RECIPE, "optim.lrr=1"], conf)
    assert not isinstance(error.value, ConfigError)
