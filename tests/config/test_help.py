"""`--help` of the verbs that compose a config."""

import pytest
import yaml

from mmlab import cli
from mmlab.config.help import field_comments
from mmlab.data.config import ImageTextDataConfig
from mmlab.training.config import TrainerConfig


@pytest.fixture
def shown(capsys):
    def show(command: str) -> str:
        assert cli.main(command.split()) == 0
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize("verb", ["train", "sample", "chat", "export", "plan", "score llava_bench"])
def test_the_overview_fits_a_screen(shown, verb):
    text = shown(f"{verb} --help")
    assert text.startswith(f"mmlab {verb} ") and len(text.splitlines()) <= 40
    assert text.splitlines()[-7] == "More" and "--help keys" in text


@pytest.mark.parametrize(
    ("verb", "groups"), [("chat", []), ("sample", ["sampler", "sampler/clip"]), ("score llava_bench", ["llm"])]
)
def test_groups_are_those_of_the_verb(shown, verb, groups):
    assert [line.split("=")[0] for line in shown(f"{verb} --help groups").splitlines() if "=" in line] == groups


def test_options_are_listed_once_by_folder(shown):
    text = shown("train --help groups")
    line = next(line for line in text.splitlines() if line.startswith("experiment=llava/  "))
    assert line.count("align_tiny") == 1 and "\nexperiment/llava" not in text and "\nmodel/language=  " in text
    assert "schema" not in text and "hydra" not in text


def test_keys_are_a_config_with_comments(shown):
    text = shown("train --help keys experiment=llava/finetune_tiny optim.lr=5e-4")
    config = yaml.safe_load(text)
    assert config["optim"]["lr"] == 5e-4 and config["stage"]["trainable"] == ["connector", "language"]
    assert "hydra" not in config
    lines = text.splitlines()
    assert "  lr: 0.0005  # above 0; peak" in lines
    assert any(line.startswith("  schedule: cosine  # cosine | constant | linear; after") for line in lines)
    assert "type: ignore" not in text
    assert "label: null  # class name or number, or a list" in shown("sample --help keys")


def test_a_field_has_the_comment_above_it_or_beside_it_or_that_of_the_base():
    assert field_comments(TrainerConfig)["max_steps"] == "optimizer steps"
    comments = field_comments(ImageTextDataConfig)
    assert comments["root"].startswith("folder or address") and comments["grids"].startswith("Rows and columns of")
    assert "betas" not in comments


def test_an_unknown_topic_is_refused(capsys):
    assert cli.main(["train", "--help", "kys"]) == 2
    assert "'kys'" in capsys.readouterr().err
