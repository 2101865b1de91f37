"""A short version of experiments/fuzz_data: mutated samples become counted bad samples or sentences, nothing else."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

FUZZ = Path(__file__).parents[1] / "experiments" / "fuzz_data" / "fuzz_data.py"


def test_mutated_samples_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = spec_from_file_location("fuzz_data", FUZZ)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    figures = module.main(tmp_path, 200, seed=7)
    assert figures["failures"] == 0, capsys.readouterr().out[-5000:]
    assert figures["mutations"] == 200 and figures["bad_samples"] > 300
    assert {"decode", "json", "unicode", "latents", "turns", "no-picture"} <= figures["reasons"].keys()
