"""What a report collects from folders of runs."""

import json
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from mmlab.config.errors import ConfigError
from mmlab.report.charts import parallel_chart, smooth, thin
from mmlab.report.run_facts import differing, read_run, thinned
from mmlab.report.run_pages import index_page, runs_page
from mmlab.report.thumbnails import thumbnail
from mmlab.runs.sweep.sweep_table import read_sweep
from mmlab.verbs.report import _sweep, _tabulate
from tests.report.tiny_runs import add_scores, make_run, make_sweep


def test_a_run_is_collected(tmp_path):
    folder = make_run(tmp_path, "a", steps=40, sheets=3)
    add_scores(folder, "color", questions=40)
    run = read_run(folder)
    assert (run.status, run.recipe) == ("finished", "llava/align_tiny")
    assert run.overrides == ["optim.lr=0.001", "data.root=plain"]
    assert (run.steps, run.end, run.commit, run.starts) == (40, "40 steps", "0123456789", ["2026-01-02T03:04:05+0000"])
    steps, values = run.curves["val/loss"]
    assert steps.tolist() == [20, 40] and values[-1] == pytest.approx(run.last["val/loss"], abs=1e-5)
    assert list(run.sheets) == [10, 20, 30] and list(thinned(run.sheets, 2)) == [10, 30]
    (scores,) = run.evaluations(_tabulate)
    assert scores.table[1][:3] == ["all", "40", "50.00%"]
    assert (scores.main["score"], scores.main["blind"], scores.main["gain"]) == ("50.00%", "25.00%", "25.00%")
    assert len(scores.examples) == 12 and scores.left_out == 28
    assert [row["right"] for row in scores.examples] == ["no"] * 6 + ["yes"] * 6


def test_differences_leave_out_names_and_places(tmp_path):
    runs = [read_run(make_run(tmp_path, name, rate=rate)) for name, rate in (("a", 1e-3), ("b", 1e-2))]
    assert differing(runs) == {"optim.lr": ["0.001", "0.01"]}
    for run in runs:
        place = {"dirpath": f"{run.folder}/checkpoints", "name": run.name}
        run.config.update(callbacks=place, optim={}, trainer={"precision": f"{run.name}16", "backend": run.name})
    names = {"trainer.precision": ["a16", "b16"], "trainer.backend": ["a", "b"]}
    assert differing(runs) == names, "only places in the runs and names of the runs are left out"


def test_files_of_another_kind_are_named_and_long_sheets_shrink(tmp_path):
    folder = make_run(tmp_path, "a", failed=["x"], code={"commit": "0"}, data_report=[1])
    (folder / "done.json").write_text("[1]")
    (folder / "config.yaml").write_text("- a\n")
    add_scores(folder)
    scores = folder / "eval" / "plain" / "scores.json"
    scores.write_text('{"types": {}, "questions": "many", "metric": "exact"}')
    run = read_run(folder)
    assert (run.error, run.config, run.done, run.code, run.data, run.end) == (None, {}, {}, [], {}, "")
    assert [Path(fault.split()[0]).name for fault in run.faults] == [
        *("failed.json", "config.yaml", "done.json", "code.json", "data_report.json")
    ]
    assert "holds no dict" in run.faults[0] and run.evaluations(_tabulate)[0].main == {}
    assert "another layout" in run.faults[-1]
    Image.new("RGB", (10, 20_000)).save(folder / "sheet.png")
    assert thumbnail(folder / "sheet.png").startswith("data:image/webp;base64,") and thumbnail(scores) == ""


def test_the_data_report_has_a_table_of_buckets(tmp_path):
    row = {"seen": 8, "share": 1.0}
    source = {**row, "bucket/64x96": 6, "bucket/96x64": 2}
    buckets = {"64x96": {"seen": 6, "share": 0.75, "cropped": 0.125}, "96x64": {"seen": 2, "share": 0.25}}
    report = {"train": {"seen": 8, "sources": {"a": source}, "types": {}, "buckets": buckets, "bad": []}}
    page = runs_page([read_run(make_run(tmp_path, "a", steps=1, data_report=report))], _tabulate)
    assert "bucket/" not in page and page.count("64x96") == 1 and "12.50%" in page


def test_damaged_and_missing_files_are_named(tmp_path):
    folder = make_run(tmp_path, "a", failed={"error": "The loss is NaN."})
    for name in ("code.json", "data_report.json", "config.yaml"):
        (folder / name).write_text("{")
    (folder / "done.json").unlink()
    (folder / "metrics.csv").write_text("step,train/loss\n1,2.0\n2,oops\n3,nan\n4,1")
    run = read_run(folder)
    assert (run.status, run.error, run.steps, run.commit) == ("failed", "The loss is NaN.", 3, "")
    assert thin(run.curves["train/loss"], 10)[0].tolist() == [1]
    assert [any(name in fault for fault in run.faults) for name in ("code.json", "data_report.json", "config.yaml")]
    assert any("1 of 3 rows" in fault for fault in run.faults)


def test_thinning_keeps_peaks_and_smoothing_keeps_lines():
    steps, values = np.arange(10_000, dtype=np.int32), np.zeros(10_000, np.float32)
    values[1234], values[8765] = 7, -3
    few = thin((steps, values), 100)
    assert (
        len(few[0]) <= 100
        and {1234: 7.0, 8765: -3.0}.items() <= dict(zip(*map(np.ndarray.tolist, few), strict=True)).items()
    )
    line = np.linspace(0, 1, 500, dtype=np.float32)
    assert np.allclose(smooth((steps[:500], line))[1], line, atol=1e-6)
    assert smooth((steps, values))[1].max() < 0.1


def test_a_sweep_is_read_back(tmp_path):
    file = make_sweep(tmp_path, 5) / "table.csv"
    table = read_sweep(file, maximize=False)
    assert table.csv() == file.read_text()
    assert [row.status for row in table.rows] == ["complete"] * 4 + ["failed"]
    assert table.swept == ["optim.lr", "model/connector", "seed"] and table.value(table.rows[0]) is not None
    for text in ("a,b\n1,2\n", "seed,run,status,steps\n1,a,complete,3\n", "", "\0"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="is not the table of a sweep"):
            read_sweep(file, maximize=False)
    file.write_text("run,status,steps,loss\na,gone,3,1\n")
    with pytest.raises(ConfigError, match="has the status 'gone'"):
        read_sweep(file, maximize=False)


def test_a_chart_cannot_end_the_element_that_it_stands_in(tmp_path):
    chart = parallel_chart(read_sweep(make_sweep(tmp_path, 5, kind="</script><b>") / "table.csv", maximize=False)) or ""
    assert not set("<>&") & set(chart) and "</script><b>" in str(json.loads(chart))


def test_a_link_in_the_index_is_an_address_in_its_folder(tmp_path):
    for name in ("javascript:alert(1)", '" onclick="a'):
        (make_run(tmp_path, name, steps=1) / "report.html").write_text("")
        run = read_run(tmp_path / name)
        page = index_page(tmp_path, [run], [])
        assert f'<a href="{quote(name)}/report.html">' in page and 'href="javascript:' not in page
        (tmp_path / name / "report.html").unlink()
        assert "<a " not in index_page(tmp_path, [run], [])


def test_the_direction_of_a_sweep_stands_in_a_config_that_can_be_read(tmp_path):
    file = make_sweep(tmp_path, 5) / "table.csv"
    (tmp_path / "point0" / "config.yaml").write_text("- a\n")
    assert not _sweep(file).maximize
    for n in (1, 2, 3):
        (tmp_path / f"point{n}" / "config.yaml").write_text("sweep: {direction: maximize}")
    assert _sweep(file).maximize
