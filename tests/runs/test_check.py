"""Checks of a training config before any model is built."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from mmlab.config.compose import compose
from mmlab.config.errors import ConfigError
from mmlab.runs.check import check, check_length, check_local_files, check_sampling, check_sources, looks_local
from mmlab.runs.index_files import INDEX_NAME, MANIFEST
from mmlab.runs.run import finish, prepare_run
from mmlab.verbs.train import train
from tests.config.tiny_conf import write_conf

RECIPE = "experiment=llava/align_tiny"


@pytest.fixture
def conf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        (tmp_path / "shapes" / split / INDEX_NAME).mkdir(parents=True)
        (tmp_path / "shapes" / split / INDEX_NAME / MANIFEST).touch()
    return write_conf(tmp_path / "tree")


def sentence(conf, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        check(compose("train", [RECIPE, *overrides], conf))
    return str(error.value)


def test_a_valid_config_passes(conf):
    check(compose("train", [RECIPE], conf))
    check(compose("train", [RECIPE, "callbacks.samples=null"], conf))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "stage.trainable=[conector]",
            "stage.trainable: the model has no part 'conector'. Did you mean 'connector'? "
            "Parts: vision, connector, language.",
        ),
        ("stage.trainable=[]", "stage.trainable is empty; name the parts to train: vision, connector, language."),
        (
            "+optim.part_lr.langage=1e-3",
            "optim.part_lr: the model has no part 'langage'. Did you mean 'language'?",
        ),
        ("+optim.part_lr.connector=0", "optim.part_lr.connector=0 must be above 0; to freeze a part, leave it out of"),
        ("optim.min_lr=3e-3", "optim.min_lr=0.003 is above optim.lr=0.002, so the learning rate would rise; lower"),
        ("trainer.max_steps=null", "The run has no end; give trainer.max_steps=… or trainer.max_epochs=…"),
        ("data.micro_batch=3", "micro_batch"),
        ("trainer.devices=3", "global_batch"),
        (
            "trainer.devices=two",
            "'trainer.devices' must be a number above 0, a list of numbers or auto, not 'two'.",
        ),
        ("trainer.devices=0", "'trainer.devices' must be a number above 0"),
        ("trainer.devices=[a]", "'trainer.devices' must be a number above 0, a list of numbers or auto, not ['a']."),
        ("trainer.strategy=dpp", "'trainer.strategy' cannot be 'dpp'. Did you mean 'ddp'?"),
        ("trainer.strategy=2", "'trainer.strategy' cannot be '2'. Options: auto, ddp, fsdp, …."),
        ("trainer.strategy=ddp_spawn", "'trainer.strategy' cannot be 'ddp_spawn'. Did you mean 'ddp"),
        ("data.train=[]", "'data.train' has no source"),
        (
            "data.train=[{path: train, weight: 1},{path: val}]",
            "'data.train.1' has no weight; give every source one, or none.",
        ),
        (
            "data.train=[{path: trian}]",
            "'data.train.0.path': there is no folder shapes/trian. Did you mean 'train'?",
        ),
        (
            "model.language.tokenizer=./tokens",
            "'model.language.tokenizer': there is no tokenizer folder ./tokens.",
        ),
        (
            "model.vision.source=/nowhere/clip",
            "'model.vision.source': there is no model folder /nowhere/clip.",
        ),
        ("stage.init_from=[llava/vision]", "There is no run 'llava/vision' in runs."),
        ("model.connector._target_=os.system", "'model.connector._target_' 'os.system' is not allowed."),
        ("callbacks.samples=false", "callbacks.samples=False: give a mapping with a _target_, or null"),
        ("+callbacks.x={_target_: torch.load}", "'callbacks.x._target_' 'torch.load' is not allowed."),
        (
            "+callbacks.rate={_target_: lightning.pytorch.callbacks.LearningRateMonitor, logging_intervall: step}",
            "'callbacks.rate': lightning.pytorch.callbacks.LearningRateMonitor takes no argument "
            "'logging_intervall'. Did you mean 'logging_interval'?",
        ),
    ],
)
def test_an_invalid_config_is_refused(conf, override, expected):
    assert expected in sentence(conf, override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "trainer.precision=16-mixed",
            "trainer.strategy=fsdp does not train with trainer.precision=16-mixed; use one of auto, 32-true, "
            "bf16-mixed, bf16-true.",
        ),
        (
            "model.language.quantize=nf4",
            "model.language.quantize=nf4: 4-bit weights cannot be sharded; use trainer=ddp, or leave out",
        ),
        ("trainer.strategy=FSDP", "'trainer.strategy' cannot be 'FSDP'. Did you mean 'fsdp'?"),
    ],
)
def test_what_cannot_be_sharded_is_refused(conf, override, expected):
    assert expected in sentence(conf, "trainer.strategy=fsdp", override)


def test_a_stage_of_ones_own_needs_settings(conf):
    cfg = compose("train", [RECIPE], conf)
    cfg.stage = OmegaConf.create({"_target_": "mylab.stages.Mine", "trainable": ["connector"]})
    with pytest.raises(ConfigError, match="has no settings: its page must begin with those of its base"):
        check(cfg)


def test_no_learning_rate_rises_to_min_lr(conf):
    part = "+optim.part_lr.connector=1e-4"
    assert "optim.min_lr=0.001 is above optim.part_lr.connector=0.0001" in sentence(conf, part, "optim.min_lr=1e-3")
    for fits in (["optim.min_lr=2e-3"], [part, "optim.min_lr=1e-4"], ["optim.min_lr=1", "optim.schedule=constant"]):
        check(compose("train", [RECIPE, *fits], conf))


def test_a_run_without_its_gpu_is_refused_where_it_starts(conf, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    cfg = compose("train", [RECIPE, "trainer=gpu"], conf)
    check(cfg)  # `check` alone, as before a sweep: the machine that submits a job may have no GPU
    with pytest.raises(ConfigError, match="no GPU that torch can use"):
        train(cfg)
    assert not Path("runs").exists()
    start = prepare_run(cfg)
    start.open()
    (start.folder / "artifacts/connector").mkdir(parents=True)
    finish(start.folder, {})
    train(cfg)
    assert "is complete" in capsys.readouterr().out


def test_data_of_another_kind_are_refused():
    cfg = compose("train", ["experiment=llava/align_tiny", "data=cifar10", "data.root=."])
    with pytest.raises(ConfigError, match="ProjectorAlignment reads ImageTextDataConfig, and data is ImageDataConfig"):
        check(cfg)


def test_a_required_part_cannot_be_null(conf):
    assert "'model.connector' cannot be null; choose model/connector=<option>." in sentence(
        conf, "model.connector=null"
    )


def test_balancing_types_excludes_weights(conf):
    check(compose("train", [RECIPE, "data.balance=type"], conf))
    assert "data.balance=type weights" in sentence(conf, "data.balance=type", "data.train=[{path: train, weight: 1}]")


def test_a_missing_index_names_the_command_that_creates_it(conf, tmp_path):
    (tmp_path / "shapes" / "val" / INDEX_NAME / MANIFEST).unlink()
    assert "'data.val.0.path': there are no shards in shapes/val; `mmlab shards build`" in sentence(conf)
    (tmp_path / "shapes" / "val" / "000000.tar").touch()
    says = "have no index; run `mmlab shards index shapes/val`, or train without one with data/loader=stream."
    assert sentence(conf).endswith(says)


def test_an_address_is_not_a_folder(conf):
    cfg = compose("train", [RECIPE, "data.root=s3://bucket/laion", "data.train=[{path: a}, {path: gs://b/c}]"], conf)
    check_sources(cfg.data)
    config: Any = OmegaConf.to_object(cfg.data)
    assert [str(config.folder(source)) for source in config.train] == ["s3://bucket/laion/a", "gs://b/c"]


def test_a_missing_cache_names_the_command_that_encodes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = compose("train", ["experiment=taming/ffhq_prior"])
    with pytest.raises(ConfigError, match="`mmlab shards encode RUN SRC OUT` creates shards"):
        check_sources(cfg.data)
    (tmp_path / "data" / "ffhq" / "codes" / "train").mkdir(parents=True)
    with pytest.raises(ConfigError, match="`mmlab shards encode RUN SRC OUT` creates them"):
        check_sources(cfg.data)
    cfg.data.latents = False
    with pytest.raises(ConfigError, match="`mmlab shards build`"):
        check_sources(cfg.data)


def test_an_option_without_a_schema_is_checked_against_its_class(conf):
    option = conf / "model" / "connector" / "own.yaml"
    option.write_text("_target_: mmlab.model.connector.MLPConnector\n_partial_: true\ndepth: 4\n")
    check(compose("train", [RECIPE, "model/connector=own"], conf))
    assert sentence(conf, "model/connector=own", "+model.connector.dept=1") == (
        "There is no key 'model.connector.dept'. Did you mean 'depth'?"
    )


def test_names_that_look_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert all(looks_local(name) for name in ("./x", "../x", "/x/y", "~/x", "a/b/c", "data/tokenizer", "data/sd/unet"))
    assert not any(looks_local(name) for name in ("gpt2", "openai/clip-vit-large-patch14", "owner/sd/unet"))


def test_architectures_are_not_searched_for_paths():
    check_local_files(OmegaConf.create({"language": {"architecture": {"source": "/nowhere"}, "tokenizer": None}}))


DRAWS = ("model=diffusion", "model/denoiser=unet_tiny", "data=emoji", "stage=latent_diffusion", "trainer.max_steps=1")
SHORT = ("process=cosine_v", "process.timesteps=20")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sampler=ddim", *SHORT], r"^sampler: steps=50 must lie in 1 … 20, the number of timesteps\.$"),
        (SHORT, r"^sampler, DDIM by default: steps=50 must lie in 1 … 20"),
        (["sampler=ddpm", "process=cosine_v", "process.timesteps=100"], r"steps=1000 must lie in 1 … 100"),
        (["sampler=ddim", "process=zero_snr_v", "sampler.spacing=leading"], r"spacing=leading with 50 steps starts at"),
        (["sampler=ddim", "process=zero_snr_v", "process.target=epsilon"], r"zero_terminal_snr=true needs target=v"),
        (["sampler=ddim", "process=flow", "sampler.spacing=linspace"], r"flow matching takes spacing=trailing"),
        (["sampler=ddim", "process=cosine_v", "process.target=epsilon"], r"epsilon leaves the image undetermined"),
        (
            ["sampler=ddim", "process=ddpm", "sampler/clip=pixels", "model/first_stage=kl_tiny"],
            r"is for pixels; latents",
        ),
        (["sampler=ddim", "process=ddpm", "sampler.guidance.scale=3"], r"scale=3 has no effect on an unconditional"),
    ],
)
def test_a_sampler_that_cannot_draw_what_is_trained_is_refused(overrides, says):
    with pytest.raises(ConfigError, match=says):
        check_sampling(compose("train", [*DRAWS, *overrides]))


@pytest.mark.parametrize(
    "overrides",
    [
        ["process=ddpm"],
        ["process=flow", "sampler=euler"],
        ["process=ddpm", "sampler=ddim", "sampler/clip=pixels"],
        ["process=cosine_v", "process.target=epsilon", "sampler=ddim", "sampler/clip=pixels"],
        ["process=ddpm", "sampler=ddim", "model/first_stage=kl_tiny", "sampler/clip=pixels", "sampler.clip.limit=4"],
        [*SHORT, "sampler=ddim", "sampler.steps=20"],
    ],
)
def test_samplers_that_fit(overrides):
    check_sampling(compose("train", [*DRAWS, *overrides]))


def test_streamed_shards_need_an_end_and_no_index(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "shapes" / "train").mkdir(parents=True)
    stream = ["experiment=llava/align_tiny", "data/loader=stream", "data.val=[{path: train, name: val}]"]
    cfg = compose("train", stream)
    with pytest.raises(ConfigError, match=r"'data\.train\.0\.path': there are no \.tar files in data/shapes/train"):
        check_sources(cfg.data)
    (tmp_path / "data" / "shapes" / "train" / "0.tar").touch()
    check_sources(cfg.data)
    with pytest.raises(ConfigError, match=r"'data\.train\.0\.path': source 'train' has 1 shard, fewer than the 2"):
        check_sources(cfg.data, world=2)
    cfg.data.train[0].path = "pipe:cat 0.tar"
    with pytest.raises(ConfigError, match=r"'data\.train\.0\.path': .* commands never run"):
        check_sources(cfg.data)
    cfg.trainer.max_epochs = 2
    with pytest.raises(ConfigError, match=r"max_epochs counts samples.*max_steps=… trainer\.max_epochs=null"):
        check_length(cfg)
    cfg.data.loader.samples = 100
    check_length(cfg)
