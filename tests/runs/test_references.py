"""What a run's config refers to is found from any working folder, and after the runs were moved."""

import json
from pathlib import Path

import pytest

from mmlab.config.compose import compose
from mmlab.runs.references import locate_files, starting_runs, tokenizer_folder
from mmlab.runs.run import load_run_config, prepare_run

RECIPE = "experiment=llava/align_tiny"
RUNS = ("llava-vision_tiny", "llava-language_tiny")


@pytest.fixture
def trained(tmp_path, monkeypatch) -> Path:
    """A working folder with a tokenizer, a part of another run, two runs, and one that started from them."""
    work = tmp_path / "work"
    tokenizer(work / "data" / "shapes" / "tokenizer")
    (work / "runs" / "eye" / "artifacts" / "vision").mkdir(parents=True)
    for name in RUNS:
        (work / "runs" / name).mkdir()
        (work / "runs" / name / "config.yaml").write_text("{}")
    monkeypatch.chdir(work)
    start = prepare_run(compose("train", [RECIPE, "run.name=mine", "model.vision.source=runs/eye/artifacts/vision"]))
    start.open()
    start.record({"cwd": str(work)})
    elsewhere = tmp_path / "elsewhere"
    tokenizer(elsewhere / "data" / "shapes" / "tokenizer")  # of another project
    monkeypatch.chdir(elsewhere)
    return work


def tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def located(run: Path):
    cfg = load_run_config(run)
    locate_files(cfg, run)
    return cfg.model


def test_paths_are_relative_to_where_the_run_was_trained(trained):
    run = trained / "runs" / "mine"
    assert starting_runs(load_run_config(run), run) == [trained / "runs" / name for name in RUNS]
    model = located(run)
    assert model.language.tokenizer == str(trained / "data" / "shapes" / "tokenizer")
    assert model.vision.source == str(trained / "runs" / "eye" / "artifacts" / "vision")


def test_the_run_s_own_tokenizer_wins(trained):
    run = trained / "runs" / "mine"
    kept = tokenizer(tokenizer_folder(run, "language"))
    tokenizer(run / "artifacts" / "language")
    assert located(run).language.tokenizer == str(kept)
    (kept / "tokenizer_config.json").unlink()
    assert located(run).language.tokenizer == str(run / "artifacts" / "language")


def test_a_moved_folder_of_runs_needs_nothing_else(trained):
    moved = trained.rename(trained.with_name("gone")) / "runs"
    moved = moved.rename(trained.with_name("moved"))
    run = moved / "mine"
    assert starting_runs(load_run_config(run), run) == [moved / name for name in RUNS]
    assert located(run).vision.source == str(moved / "eye" / "artifacts" / "vision")
    beside = tokenizer(moved / "llava-language_tiny" / "artifacts" / "language")
    assert located(run).language.tokenizer == str(beside)


def test_absolute_runs_that_were_moved_are_found_beside(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(trained)
    runs = trained / "runs"
    names = f"stage.init_from=[{runs / RUNS[0]},runs/{RUNS[1]}]"
    start = prepare_run(compose("train", [RECIPE, f"run.root={runs}", "run.name=absolute", names]))
    start.open()
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = runs.rename(tmp_path / "moved")
    run = moved / "absolute"
    assert starting_runs(load_run_config(run), run) == [moved / name for name in RUNS]


def test_a_name_on_the_hub_stays(trained):
    run = trained / "runs" / "mine"
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("data/shapes/tokenizer", "someone/tokenizer"))
    assert located(run).language.tokenizer == "someone/tokenizer"
    assert json.loads((run / "identity.json").read_text())["cwd"] == str(trained)
