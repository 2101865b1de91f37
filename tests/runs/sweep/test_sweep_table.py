"""A sweep's table: order, columns, digits."""

import csv
import math
from pathlib import Path

from mmlab.runs.sweep.sweep_picture import write_sweep
from mmlab.runs.sweep.sweep_table import Row, SweepTable


def row(name: str, status: str = "complete", loss: float | None = None, **swept: str) -> Row:
    metrics = {"steps": 3, "train/loss": loss, "val/loss": 2.0} if loss is not None else {}
    return Row(swept or {"lr": name}, name, status, metrics)


POINTS = [
    row("missing", "missing"),
    row("nan", loss=math.nan),
    row("good", loss=0.123456789),
    row("failed", "failed"),
    row("bad", loss=7.0),
]


def names(maximize: bool) -> list[str]:
    return [row.run for row in SweepTable("t", "train/loss", maximize, POINTS).rows]


def test_the_best_point_is_first_and_missing_ones_are_last():
    assert names(maximize=False) == ["good", "bad", "nan", "failed", "missing"]
    assert names(maximize=True) == ["bad", "good", "nan", "failed", "missing"]


def test_the_csv_has_full_precision_and_the_text_few_digits():
    table = SweepTable("t", "val/loss", False, POINTS)
    rows = list(csv.DictReader(table.csv().splitlines()))
    assert list(rows[0]) == ["lr", "run", "status", "steps", "val/loss", "train/loss"]
    assert {row["run"]: row["train/loss"] for row in rows}["good"] == "0.123456789"
    assert rows[-1] == dict.fromkeys(rows[0], "") | {"lr": "missing", "run": "missing", "status": "missing"}
    assert "0.12346" in table.text() and "0.1234567" not in table.text()
    assert len({line.index("complete") for line in table.text().splitlines()[1:3]}) == 1


def test_points_may_have_different_keys():
    table = SweepTable("t", "train/loss", False, [row("a", loss=1.0, x="1"), row("b", loss=2.0, y="long, with comma")])
    rows = list(csv.DictReader(table.csv().splitlines()))
    assert [(r["x"], r["y"]) for r in rows] == [("1", ""), ("", "long, with comma")]


def point(seed: int, loss: float | None, status: str = "complete", **swept: str) -> Row:
    metrics = {} if loss is None else {"steps": 3, "val/loss": loss, "val/note": "text"}
    return Row({**swept, "seed": str(seed)}, f"{swept}-{seed}", status, metrics)


SEED_POINTS = [
    *(point(seed, loss, lr="0.1") for seed, loss in ((0, 4.0), (1, 2.0), (2, 3.0))),
    *(point(seed, loss, lr="0.2") for seed, loss in ((0, 1.0), (1, 2.0), (2, math.nan))),
    point(0, None, "failed", lr="0.3"),
    point(0, 1.75, lr="0.4"),
]


def table(points: list[Row] = SEED_POINTS, maximize: bool = False) -> SweepTable:
    return SweepTable("t", "val/loss", maximize, points)


def test_points_that_differ_only_in_their_seed_are_one_setting():
    settings = table().settings
    assert [setting.swept["lr"] for setting in settings] == ["0.2", "0.4", "0.1", "0.3"]
    assert [setting.mean("val/loss") for setting in settings] == [1.5, 1.75, 3.0, None]
    # Sample standard deviation: for 1 and 2 it is the square root of 1/2.
    assert [setting.spread("val/loss") for setting in settings] == [0.5**0.5, None, 1.0, None]
    assert [setting.swept["lr"] for setting in table(maximize=True).settings] == ["0.1", "0.4", "0.2", "0.3"]


def test_runs_counts_those_with_the_metric():
    metrics = [{"val/loss": 1.0, "val/psnr": 20.0}, {"val/loss": math.nan, "val/psnr": 22.0}]
    points = [Row({"seed": str(seed)}, f"{seed}", "complete", values) for seed, values in enumerate(metrics)]
    assert table(points).means_grid() == [["runs", "val/loss", "val/psnr"], ["1", "1", "21 ± 1.4"]]


def test_without_seeds_there_are_no_means(tmp_path: Path):
    without = table([Row({"lr": "0.1"}, "a", "complete", {"val/loss": 1.0})])
    assert without.settings == []
    write_sweep(without, tmp_path)
    assert not (tmp_path / "means.csv").exists()


def test_a_sweep_of_only_seeds_has_one_mean():
    (only,) = table([point(seed, float(seed)) for seed in range(3)]).settings
    assert (only.swept, only.mean("val/loss"), only.spread("val/loss")) == ({}, 1.0, 1.0)


def test_the_means_have_full_precision_in_the_file(tmp_path: Path):
    write_sweep(table(), tmp_path)
    rows = list(csv.DictReader((tmp_path / "means.csv").open()))
    assert (tmp_path / "means.csv").read_text() == table().means_csv()
    assert rows[0] == {
        "lr": "0.2",
        "runs": "2",
        "val/loss mean": "1.5",
        "val/loss spread": str(0.5**0.5),
    }
    assert [row["runs"] for row in rows] == ["2", "1", "3", "0"]
    assert [line[2] for line in table().means_grid()] == ["val/loss", "1.5 ± 0.71", "1.75", "3 ± 1", ""]
