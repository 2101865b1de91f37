"""A run with compiled layers: its checkpoints are those of any run, and a machine without a compiler is named."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from mmlab import cli
from mmlab.model import compiled_layers
from tests.e2e.test_resume import TINY
from tests.tiny_commands import carry_out

RUN = ["train", *TINY, "data.pack=true", "trainer.val_every=2", "run.name=chat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    build, tokenizer = (
        "build shapes data/shapes/train --count 24",
        "tokenizer data/shapes/train --out data/shapes/tokenizer",
    )
    return carry_out(tmp_path_factory.mktemp("compile"), [f"shards {build}", f"shards {tokenizer}"])


@pytest.fixture(autouse=True)
def here(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "kernels"))


def test_a_run_may_go_on_with_and_without_compiled_layers(monkeypatch, capfd):
    monkeypatch.setattr(compiled_layers, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    onednn = "trainer.products=onednn"
    assert cli.main([*RUN, "trainer.max_steps=3", "trainer.compile=true", onednn]) == 0
    said = capfd.readouterr()
    assert "compiling 1 layers, which takes a while; kernels are kept in" in said.out
    assert said.err.count("layers compute their products by torch, which is slower on this CPU") == 1
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 2, "only training steps compile, and rows of any length share a graph"
    assert cli.main([*RUN, "trainer.max_steps=5"]) == 0
    said = capfd.readouterr()
    assert "another trainer.compile (True, now False): steps before and after it are computed in diff" in said.err
    assert counters["stats"]["unique_graphs"] == graphs
    assert cli.main([*RUN, "trainer.max_steps=6", "trainer.compile=true"]) == 0
    assert "another trainer.compile (False, now True)" in capfd.readouterr().err


def test_a_layer_that_cannot_be_compiled_is_said(monkeypatch, capfd):
    def backend(graph, inputs):
        raise ValueError("no such kernel.\nMore lines.")

    monkeypatch.setattr(compiled_layers, "BACKEND", backend)
    torch._dynamo.reset()
    assert cli.main([*RUN, "run.name=broken", "trainer.max_steps=1", "trainer.compile=true"]) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "A layer could not be compiled" in last and "no such kernel; leave out trainer.compile" in last


def test_a_missing_compiler_is_named_before_the_run(monkeypatch, capfd):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert cli.main([*RUN, "run.name=none", "trainer.max_steps=1", "trainer.compile=true"]) == 2
    assert "trainer.compile=true needs a C++ compiler, but there is no" in capfd.readouterr().err
    assert not Path("runs/none").exists()


def test_a_plan_compiles_nothing(capfd):
    torch._dynamo.reset()
    counters.clear()
    assert cli.main(["plan", *TINY, "trainer.max_steps=1", "trainer.compile=true"]) == 0
    assert counters["stats"]["unique_graphs"] == 0
