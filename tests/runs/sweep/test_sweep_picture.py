"""A sweep's figure: its panels and tables."""

import errno
import math
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mmlab.config.errors import RunError
from mmlab.runs.sweep.sweep_picture import BAD, FAINT, GOOD, INK, sweep_figure, write_sweep
from mmlab.runs.sweep.sweep_table import Row, SweepTable


def row(loss: float | None, status: str = "complete", run: str = "r", **swept: str) -> Row:
    return Row(swept, run, status, {} if loss is None else {"steps": 3, "val/loss": loss})


def figure(*points: Row, title: str = "t", maximize: bool = False) -> Figure:
    return sweep_figure(SweepTable(title, "val/loss", maximize, list(points)))


def panel(values: list[str], losses: list[float] | None = None) -> Axes:
    """The only panel of a sweep over one key."""
    losses = [1.0 + i for i in range(len(values))] if losses is None else losses
    (axes,) = figure(*(row(loss, x=value) for value, loss in zip(values, losses, strict=True))).axes
    return axes


def labels(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def lines(drawn: Figure) -> list[tuple[str, str]]:
    """The lines below the panels and their colors."""
    return [(text.get_text().rstrip(), str(text.get_color())) for text in drawn.texts[1:]]


def test_each_swept_key_has_a_panel_of_all_points_with_the_best_in_green():
    points = [row(3.0, lr="0.1", width="64"), row(1.0, lr="0.2", width="64"), row(2.0, lr="0.2", width="128")]
    for maximize, best in ((False, (0.2, 1.0)), (True, (0.1, 3.0))):
        drawn = figure(*points, row(None, "failed", lr="0.3", width="1"), maximize=maximize)
        assert [axes.get_title("left") for axes in drawn.axes] == ["val/loss over lr", "val/loss over width"]
        every, green = drawn.axes[0].collections
        assert sorted(map(tuple, every.get_offsets().tolist())) == [(0.1, 3.0), (0.2, 1.0), (0.2, 2.0)]
        assert green.get_offsets().tolist() == [list(best)] and green.get_zorder() > every.get_zorder()
        assert not drawn.axes[0].lines, "points that differ in another key are not joined"


def test_points_of_one_key_are_joined_in_order():
    (line,) = panel(["3", "1", "2"]).lines
    assert line.get_xydata().tolist() == [[1, 2], [2, 3], [3, 1]]


def test_without_a_score_there_is_no_panel():
    assert figure(row(None, "missing", x="1"), row(math.nan, x="2")).axes == []
    assert len(figure(row(None, "missing", x="1"), row(1.0, x="2")).axes) == 1


def test_a_key_of_points_without_a_score_has_an_empty_panel():
    first, second = figure(row(1.0, x="1"), row(None, "failed", y="2")).axes
    assert first.collections and not second.collections


@pytest.mark.parametrize(
    ("values", "scale", "shown"),
    [
        (["0.001", "1e-1", "0.01"], "log", ["0.001", "0.01", "0.1"]),
        (["64", "256", "128"], "linear", ["64", "128", "256"]),
        (["4", "4"], "linear", ["4"]),
        (["linear", "cosine", "linear"], "linear", ["cosine", "linear"]),
        (["0.1", "none"], "linear", ["0.1", "none"]),
        (["llava/tiny", "ablations/last_layer"], "linear", ["last_layer", "tiny"]),
        (["a/x", "b/x"], "linear", ["a/x", "b/x"]),
        (["[{p: a/x}]", "[{p: a/y}]"], "linear", ["[{p: a/x}]", "[{p: a/y}]"]),
        (["name_of_twenty_three", "short"], "linear", ["name_of_twenty_…", "short"]),
    ],
)
def test_numbers_are_placed_by_size_and_names_in_order(values, scale, shown):
    axes = panel(values)
    assert axes.get_xscale() == scale and labels(axes) == shown


def test_names_are_evenly_spaced():
    assert panel(["b", "a", "c"]).collections[0].get_offsets()[:, 0].tolist() == [1, 0, 2]
    assert labels(panel([f"{i:02d}th" for i in range(50)])) == [f"{i:02d}th" for i in range(0, 50, 3)]


def test_labels_of_numbers_do_not_overlap():
    assert labels(panel(["0", "0.0001", "0.1"])) != ["0", "0.0001", "0.1"]
    assert len(labels(panel([str(10.0**-i) for i in range(12)]))) < 40


def test_the_metric_has_a_log_axis_over_decades():
    assert panel(["1", "2"], [0.1, 10.0]).get_yscale() == "log"
    assert panel(["1", "2"], [1.0, 10.0]).get_yscale() == panel(["1", "2"], [-1.0, 90.0]).get_yscale() == "linear"


def seeds(*losses: float, **swept: str) -> list[Row]:
    return [row(loss, seed=str(seed), **swept) for seed, loss in enumerate(losses)]


def test_seeds_are_shown_as_the_spread_of_their_setting():
    drawn = figure(*seeds(1.0, 2.0, 3.0, lr="0.1"), *seeds(5.0, 7.0, lr="0.2"), *seeds(6.0, lr="0.3"))
    (axes,) = drawn.axes
    assert axes.get_title("left") == "val/loss over lr"
    ((means, _, (spreads,)),) = axes.containers
    assert means.get_xydata().tolist() == [[0.1, 2.0], [0.2, 6.0]], "one seed has no spread"
    ends = [segment[:, 1].tolist() for segment in spreads.get_segments()]
    assert ends == [[1.0, 3.0], pytest.approx([6 - 2**0.5, 6 + 2**0.5])]


def test_a_spread_below_zero_keeps_the_axis_linear():
    assert figure(*seeds(0.1, 9.0, lr="0.1")).axes[0].get_yscale() == "linear"


def test_seeds_alone_have_an_axis():
    (axes,) = figure(*seeds(1.0, 2.0)).axes
    assert axes.get_title("left") == "val/loss over seed"


def test_the_tables_are_below_with_the_means_first():
    drawn = figure(*seeds(1.0, 2.0, lr="0.1"), row(None, "failed", "f", lr="0.2", seed="0"), title="a sweep")
    assert drawn.texts[0].get_text() == "a sweep"
    assert lines(drawn) == [
        ("lr   runs  val/loss", FAINT),
        ("0.1  2     1.5 ± 0.71", GOOD),
        ("0.2  0", INK),
        ("", FAINT),
        ("seed  lr   run  status    steps  val/loss", FAINT),
        ("0     0.1  r    complete  3      1", GOOD),
        ("1     0.1  r    complete  3      2", INK),
        ("0     0.2  f    failed", BAD),
    ]


def test_nothing_is_best_without_a_score():
    colors = [color for _, color in lines(figure(row(None, "failed", x="1"), row(None, "missing", x="2")))]
    assert colors == [FAINT, BAD, FAINT]


def test_a_long_table_ends_with_the_number_of_omitted_rows():
    drawn = figure(*(row(float(i), x=str(i)) for i in range(70)))
    assert len(lines(drawn)) == 62 and lines(drawn)[-1] == ("and 10 more, in table.csv", FAINT)


def test_the_file_includes_title_panels_and_tables(tmp_path: Path):
    sizes = []
    for points in ([row(None, "missing", x="1")], [row(1.0, x="1")], [row(float(i), x=str(i)) for i in range(30)]):
        write_sweep(SweepTable("t", "val/loss", False, points), tmp_path)
        with Image.open(tmp_path / "table.png") as picture:
            assert picture.format == "PNG"
            sizes.append(picture.size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv", "table.png"]
    empty, one, many = sizes
    assert one[0] > 400 and one[1] > empty[1] + 250, "a panel is 4 by 3 inches"
    assert many[1] - one[1] == pytest.approx(29 * 20, abs=2), "a line is a fifth of an inch"
    write_sweep(SweepTable("t" * 100, "val/loss", False, [row(1.0, x="1")]), tmp_path)
    assert Image.open(tmp_path / "table.png").width > one[0] + 400, "a title of 100 letters"


def test_dollar_signs_are_not_parsed_as_math(tmp_path: Path):
    formula = r"$\no{$"
    points = [Row({formula: value}, formula, "complete", {formula: 1.0}) for value in (formula, "x")]
    write_sweep(SweepTable(formula, formula, False, points), tmp_path)
    assert (tmp_path / "table.png").exists()


def test_a_full_disk_is_one_sentence_that_names_the_picture(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(RunError, match=r"table\.png cannot be written: the disk is full"):
        write_sweep(SweepTable("t", "val/loss", False, [row(1.0, x="1")]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"table.csv"}
