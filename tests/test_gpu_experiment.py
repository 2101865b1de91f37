"""The steps of experiments/gpu/run.sh, with a tiny model on a CPU."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

from mmlab import cli
from mmlab.config.compose import compose

TINY = "{hidden_size:32,intermediate_size:48,num_hidden_layers:2,num_attention_heads:2"
RUN = [
    "experiment=llava/v15_7b_finetune",
    "stage.init_from=[]",
    "trainer=cpu",
    "trainer.max_epochs=null",
    "trainer.max_steps=12",
    "data.global_batch=2",
    "data.micro_batch=1",
    "data.max_length=320",
    "data.workers=0",
    "logger=none",
    "callbacks.progress.peak_tflops=0.1",
    f"model.language.architecture={TINY},num_key_value_heads:2,vocab_size:2000}}",
    f"model.vision.architecture={TINY},image_size:56}}",
]


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """The modules of the experiment, in a folder of its own."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "experiments" / "gpu"), *sys.path])
    monkeypatch.chdir(tmp_path)
    yield {name: import_module(name) for name in ("prepare", "measure")}
    for name in ("prepare", "measure"):
        del sys.modules[name]


def test_a_tiny_model_is_measured(experiment, capsys):
    cfg = compose("train", RUN)
    experiment["prepare"].write_data(cfg)
    assert cli.main(["shards", "build", "llava_json", "records.json", "pictures", "data/llava_mix_665k/train"]) == 0
    assert (
        cli.main(["shards", "tokenizer", "data/llava_mix_665k/train", "--out", "tokenizer", "--vocab-size=2000"]) == 0
    )
    experiment["prepare"].write_parts(cfg)
    figures = experiment["measure"].train(cfg)
    plan = experiment["measure"].plan(cfg)
    assert json.loads(json.dumps(figures)).keys() > {"tokens_per_s", "memory_gib", "mfu"}
    assert 240 < figures["tokens_per_sample"] <= 320
    # The plan has the largest batch and a loss at every token of text.
    assert 0.5 < figures["tflop_per_step"] / plan["plan_tflop_per_step"] < 1
