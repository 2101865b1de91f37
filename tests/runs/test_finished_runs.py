"""A recipe's name means its only complete run, where no run has that name."""

from pathlib import Path

import pytest

from mmlab.config.compose import compose
from mmlab.config.errors import ConfigError
from mmlab.runs.finished_runs import DONE, recipe_of
from mmlab.runs.run import find_run, prepare_run


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(name: str, *overrides: str, done: bool = True) -> Path:
    path = Path("runs", name)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("{}\n")
    (path / "overrides.txt").write_text("".join(f"{line}\n" for line in overrides))
    if done:
        (path / DONE).write_text("{}")
    return path


def starts_from(*overrides: str) -> list[str]:
    return list(compose("train", ["experiment=llava/align_tiny", *overrides]).stage.init_from)


VISION, LANGUAGE = "llava/vision_tiny", "llava/language_tiny"


def test_the_only_complete_run_of_a_recipe_is_taken_and_printed(capsys):
    renamed = run("llava-vision_tiny-1a2b3c4d", "experiment=llava/align_tiny", f"experiment={VISION}", "optim.lr=1")
    run("unfinished", f"experiment={VISION}", done=False)
    run("llava-vision_tiny-1a2b3c4d.1", f"experiment={VISION}")
    assert recipe_of(renamed) == VISION
    assert starts_from() == [renamed.name, LANGUAGE]
    assert starts_from(f"stage.init_from=[{VISION}]") == [renamed.name], "also on the command line"
    assert find_run(VISION, "runs") == renamed
    assert f"{VISION} is the run {renamed.name}: no run has that name" in capsys.readouterr().err


def test_of_several_runs_none_is_taken():
    for name in ("one", "two"):
        run(name, f"experiment={VISION}")
    assert starts_from() == [VISION, LANGUAGE]
    with pytest.raises(ConfigError, match="There is no run 'llava/vision_tiny' in runs"):
        find_run(VISION, "runs")
    run("llava-vision_tiny", f"experiment={VISION}")
    assert starts_from() == [VISION, LANGUAGE] and find_run(VISION, "runs").name == "llava-vision_tiny"


def test_a_run_goes_on_with_the_runs_that_it_started_from():
    first = run("one", f"experiment={VISION}")
    start = prepare_run(compose("train", ["experiment=llava/align_tiny"]))
    start.open()
    run("two", f"experiment={VISION}")
    run("llava-vision_tiny-clip_tiny", f"experiment={VISION}", "model/vision=clip_tiny")
    assert starts_from()[0] == first.name
    assert starts_from("run.fresh=true")[0] == VISION
    assert starts_from("run.name=other")[0] == VISION
