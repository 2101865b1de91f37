"""The points of benchmarks/cost_growth.py, the smallest of each kind."""

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

MODULES = ("cost_growth", "cost_points", "cost_plot", "attention_cost", "all_contests", "contest")


@pytest.fixture
def growth(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "benchmarks"), *sys.path])
    growth = import_module("cost_growth")
    growth.cost_points.STEPS = 1
    growth.cost_points.BATCH = 2
    yield growth
    for name in MODULES:
        sys.modules.pop(name, None)


def test_all_kinds_of_points_are_measured_and_drawn(growth, tmp_path):
    smallest = {"dataset": (1000,), "pictures": (2,), "ranks": (2,), "vocabulary_memory": (32_768,)}
    frozen = ("logits, frozen", "chunks, frozen")
    ways = {"sequence": ("blocks",), "sequence_memory": ("sdpa",), "vocabulary_memory": frozen}
    panels = tuple(
        replace(panel, values=smallest.get(panel.name, (512,)), ways=ways.get(panel.name, panel.ways))
        for panel in growth.PANELS
    )
    growth.prepare(tmp_path, panels)
    points = growth.measure(tmp_path, panels, rounds=1)
    growth.draw(points, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    times = [point for name, of_panel in points.items() if "memory" not in name for point in of_panel]
    assert len(times) == 5 and all(point["cpu_s"]["median"] > 0 for point in times)
    memory = {point["way"]: point["bytes"]["median"] for point in points["vocabulary_memory"]}
    logits = 4 * growth.cost_points.POSITIONS * 32_768
    assert memory["logits, frozen"] > 1.5 * logits > memory["chunks, frozen"]


def test_a_point_that_fails_is_named(growth, tmp_path, capfd):
    panel = growth.Panel("broken", lambda *_: 1 / 0, ("way",), (3,))
    with pytest.raises(RuntimeError, match="broken of 3, way, failed"):
        growth.measure(tmp_path, (panel,), 1)
    assert "ZeroDivisionError" in capfd.readouterr().err
