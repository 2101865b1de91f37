"""A sweep's table: order, columns, digits."""

import csv
import math

from mmlab.report.sweep_table import Row, SweepTable


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


def test_the_best_is_first_and_what_did_not_run_is_last():
    assert names(maximize=False) == ["good", "bad", "nan", "failed", "missing"]
    assert names(maximize=True) == ["bad", "good", "nan", "failed", "missing"]


def test_the_csv_has_all_digits_and_the_text_few():
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
