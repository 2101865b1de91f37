"""The commands in pages, configs and docstrings are valid."""

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmlab import cli
from mmlab.config.compose import conf_dir, hydra_verb
from mmlab.config.multirun import Multirun
from mmlab.data.survey import Survey
from mmlab.verbs import _repetition, _shard_build, _shard_checks, _shard_encode, shards
from mmlab.verbs._recipe_pages import Recipe, pages

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "slurm/README.md")]
PAGES += [*ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*/README.md")]
RECIPE = "experiment=llava/align_tiny"


def write_own_pages(folder: Path) -> None:
    """Write the configs of a user's own that pages show, each below its path, and those of `mmlab init mydata`."""
    counts = dict.fromkeys(Survey.__dataclass_fields__, 1) | {"side": 160, "square": False, "caption_answers": 0}
    for name, text in pages(Recipe("mydata", Path("data/mine"), "train", Survey(**counts), 1)).items():
        (folder / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "conf" / name).write_text(text, encoding="utf-8")
    for page in PAGES:
        for name, text in re.findall(
            r"^```yaml\n# (conf/\S+\.yaml)(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"#{text}", encoding="utf-8")


def texts() -> Iterator[str]:
    """Code blocks in pages, comments in configs, docstrings of verbs."""
    for page in PAGES:
        yield from re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for path in conf_dir().rglob("*.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        yield "\n".join(line[1:] for line in lines if line.startswith("#"))
    for path in cli.VERBS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def commands() -> list[str]:
    """Commands at the beginning of a line or after a colon; remarks follow after three spaces or a #."""
    commands: set[str] = set()
    for text in texts():
        for line in re.sub(r" *\\\n *", " ", text).splitlines():
            if match := re.match(r"(?:.*: | *)(mmlab .*)", line):
                commands.update(re.split(r"; (?=mmlab )", re.split(r" {3,}", match[1])[0]))
    return sorted(command for command in commands if "<" not in command and not is_recipe(command))


def is_recipe(command: str) -> bool:
    """Whether a command only names a recipe: tests/config/test_conf.py composes these."""
    name = command.removeprefix("mmlab train experiment=")
    return (conf_dir() / "experiment" / f"{name}.yaml").is_file()


COMMANDS = commands()


class AcceptedError(Exception):
    """The arguments have been read; nothing else needs to run."""


def stop_behind(monkeypatch, owner, name: str) -> None:
    """Raise `AcceptedError` after a function that reads arguments."""
    original = getattr(owner, name)

    def read(*args):
        original(*args)
        raise AcceptedError

    monkeypatch.setattr(owner, name, read)


def compose_points(multirun: Multirun, task) -> None:
    """Instead of running a sweep, compose the points of its grid."""
    if multirun.plugin("sweeper") == "BasicSweeper":
        for batch in multirun.grid():
            for point in batch:
                multirun.compose(point)


def compose_only(config_name: str, task, argv: list[str], sweep=None) -> int:
    """Instead of running a verb, compose its config."""
    return hydra_verb(config_name, lambda cfg: None, argv, compose_points)


def give(monkeypatch, command: str) -> int:
    """Run a command up to its work; return its exit code."""
    _, verb, *words = shlex.split(command.replace("=…", "=x"), comments=True)
    rest = RECIPE if verb == "train" else "--cfg=job"  # requires no values
    words = [rest if word == "…" else word for word in words]
    stop_behind(monkeypatch, argparse.ArgumentParser, "parse_args")
    stop_behind(monkeypatch, shards, "_parse")
    # The pages name files that are not here.
    for module, kind in (
        (shards, "existing"),
        (_shard_build, "existing"),
        (_shard_checks, "existing"),
        (_shard_encode, "existing"),
        (_shard_build, "file"),
        (_shard_build, "folder"),
    ):
        monkeypatch.setattr(module, kind, str)
    scored = {"run": "x", "data.path": "x"}
    monkeypatch.setattr(_repetition, "read_scores", lambda path: {"settings": scored})
    if verb in cli.verbs():
        module = importlib.import_module(f"mmlab.verbs.{verb.replace('-', '_')}")
        monkeypatch.setattr(module, "hydra_verb", compose_only, raising=False)
    try:
        return cli.main([verb, *words])
    except AcceptedError:
        return 0


def test_commands_are_found():
    verbs = {command.split()[1] for command in COMMANDS}
    assert len(COMMANDS) > 60
    assert verbs >= {"train", "plan", "eval", "score", "sample", "chat", "export", "curate", "convert", "shards"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_is_valid(tmp_path, monkeypatch, capsys, command):
    write_own_pages(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert give(monkeypatch, command) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "mmlab trian experiment=llava/align_tiny",
        "mmlab train experiment=llava/align_tny",
        "mmlab train -m … optim.lrr=1e-3,1e-4",
        "mmlab eval run=… data.pth=x",
        "mmlab shards build llava_json data/lcs_558k/train --json x.json --images images",
    ],
)
def test_an_invalid_command_is_detected(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert give(monkeypatch, command) == 2
