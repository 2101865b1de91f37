"""Each contest runs at tiny size, and its sides compute the same losses."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = (
    "all_contests",
    "contest",
    "llava_runs",
    "llava_stage1",
    "llava_questions",
    "ldm_runs",
    "ldm_training",
    "vqgan_training",
)


@pytest.fixture(scope="module")
def benchmarks() -> Any:
    """Imports a module of `benchmarks`, which is made for scripts, at tiny size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTEST", "tiny")
        patch.setenv("MMLAB_ALLOW_TARGETS", "llava_runs")
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["llava_stage1", "llava_questions"])
def test_both_sides_of_a_llava_training_have_the_same_losses(benchmarks, tmp_path, name):
    contest = benchmarks(name).CONTEST
    contest.prepare(tmp_path)
    theirs, ours = (side(tmp_path) for side in contest.sides.values())
    assert len(ours.losses) == benchmarks(name).TRAINING.steps
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-4)
    assert ours.losses[0] != pytest.approx(ours.losses[-1], abs=1e-4)  # something is learned
    assert ours.amount == theirs.amount > 0 and ours.seconds > 0


@pytest.mark.parametrize("name", ["ldm_training", "vqgan_training"])
def test_all_sides_of_an_image_model_have_the_same_losses(benchmarks, tmp_path, name):
    contest = benchmarks(name).CONTEST
    contest.prepare(tmp_path)
    theirs, *others = (side(tmp_path) for side in contest.sides.values())
    for ours in others:
        assert ours.losses == pytest.approx(theirs.losses, abs=contest.tolerance)
        assert ours.losses[0] != pytest.approx(ours.losses[1], abs=contest.tolerance)
        assert ours.amount == theirs.amount > 0 and ours.seconds > 0


def test_a_contest_is_measured_in_processes_of_its_own(benchmarks, capfd):
    contest = benchmarks("shard_reading").CONTEST
    figures = benchmarks("contest").measure(contest, str(FOLDER / "shard_reading.py"), rounds=1)
    ours, theirs = figures["sides"]["mmlab, shuffled"], figures["sides"]["webdataset, in order"]
    assert ours["goal"] == 6 and ours["ratio"] == pytest.approx(ours["rate"] / theirs["rate"])
    assert "webdataset, in order" in capfd.readouterr().out
    results = {
        "machine": {"processor": "one", "threads": 2, "products_gflops": {"torch": 1}},
        "versions": {"torch": "2"},
        "contests": {"reading": json.loads(json.dumps(figures))},
    }
    header, _, row, *_ = benchmarks("all_contests").table(results).splitlines()
    assert "| reading: mmlab, shuffled | webdataset, in order |" in row and row.count("|") == header.count("|")
