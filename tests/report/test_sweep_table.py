"""A sweep's table: order, columns, digits, picture."""

import csv
import math
from pathlib import Path

from PIL import Image

from mmlab.report.sweep_picture import axis, sweep_picture, write_sweep
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
    assert sweep_picture(table).width > 800


def test_the_picture_grows_with_what_there_is(tmp_path: Path):
    empty = sweep_picture(SweepTable("t", "train/loss", False, [row("a", "missing")]))
    one = sweep_picture(SweepTable("t", "train/loss", False, [row("a", loss=1.0)]))
    many = sweep_picture(SweepTable("t", "train/loss", False, [row(str(i), loss=float(i)) for i in range(200)]))
    assert empty.height + 300 < one.height < many.height < one.height + 70 * 24
    write_sweep(SweepTable("t", "train/loss", False, POINTS), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv", "table.png"]
    assert Image.open(tmp_path / "table.png").format == "PNG"


def test_an_axis_is_a_logarithm_over_decades_and_evenly_spaced_for_words():
    decades = axis(["0.001", "0.1", "0.01"])
    assert math.isclose(decades.place("0.01"), 0.5) and [text for _, text in decades.ticks] == ["0.001", "0.01", "0.1"]
    line = axis([1.0, 2.0, 3.0])
    assert math.isclose(line.place(2.0), 0.5) and 0 < line.place(1.0) < line.place(3.0) < 1
    words = axis(["linear", "cosine", "linear"])
    assert (words.place("cosine"), words.place("linear")) == (0.25, 0.75)
    assert math.isclose(axis(["4", "4"]).place("4"), 0.5)
    assert len(axis([10**-i for i in range(12)]).ticks) == 3
