"""`mmlab plan`, as a user reads it."""

import yaml

from mmlab import cli
from mmlab.config.compose import compose
from mmlab.config.folders import conf_dir
from mmlab.verbs._plan_report import _steps

RECIPE = [
    "plan",
    "experiment=llava/finetune_tiny",
    "model/vision=siglip_tiny",
    "trainer=cpu",
    "trainer.precision=32-true",
]


def test_the_plan_of_a_recipe(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*RECIPE, "plan.gpu=H100", "plan.mfu=0.5", "trainer.max_steps=100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["connector", "33,024", "0"] for line in lines)
    assert "memory of each of 1 device(s), GiB: one device, 32-true" in lines
    assert any(line.startswith("fits, with a tenth to spare, in GPUs of 24, ") for line in lines)
    assert "global batch 16 = 16 samples x 1 micro-batch(es) x 1 device(s)" in lines
    assert "tokens of a step: at most 4,096, 3,072 of them in the loss (rows of data.max_length)" in lines
    assert any(line.endswith("at 50 % of H100's 989 TFLOP/s (bf16)") for line in lines)
    assert any(line.startswith("run: 100 steps, at most ") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_the_disk_that_snapshots_of_averages_take(capsys):
    recipe = ["plan", "experiment=diffusion/ddpm_tiny", "model/denoiser=dit_tiny", "callbacks=diffusion_posthoc"]
    assert cli.main([*recipe, "callbacks.posthoc_ema.snapshots=1000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    trained = next(int(line.split()[1].replace(",", "")) for line in lines if line.startswith("all "))
    (line,) = (line for line in lines if line.startswith("snapshots of averages: "))
    assert line == f"snapshots of averages: {4000 * trained / 2**30:.2f} GiB, 1000 of {4 * trained / 2**30:.2f} GiB"


def test_settings_with_which_a_run_fits(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    big = ["data.max_length=4096", "data.global_batch=256", "data.micro_batch=256", "model.language.loss=logits"]
    assert cli.main([*RECIPE, *big, "stage.feature_cache_mb=0"]) == 0
    text = capsys.readouterr().out
    assert "run: " in text and "to fit in 80 GB, with one setting:" in text
    advice = text.partition("with one setting:")[2]
    assert "data.micro_batch=" in advice and "trainer.precision" not in advice.splitlines()[0]


def test_mistakes_end_with_one_sentence(capsys):
    assert cli.main([*RECIPE, "plan.gpu=H1000"]) == 2
    assert "'plan.gpu' cannot be 'H1000'. Did you mean 'H100'?" in capsys.readouterr().err
    assert cli.main([*RECIPE, "data.micro_batch=5"]) == 2
    assert "the nearest micro batch" in capsys.readouterr().err


def test_a_plan_composes_what_a_run_does():
    plan, train = (yaml.safe_load((conf_dir() / f"{name}.yaml").read_text())["defaults"] for name in ("plan", "train"))
    assert plan[1:] == train[1:]


def test_the_length_of_a_stream_is_stated_or_unknown():
    stream = ["experiment=llava/finetune_tiny", "data/loader=stream", "trainer.max_steps=100", "data.global_batch=16"]
    assert _steps(compose("plan", stream)) == (100, "100 steps (without an index, the samples of a pass are unknown)")
    counted = compose("plan", [*stream, "data.loader.samples=640", "trainer.max_epochs=0.5"])
    assert _steps(counted) == (20, "20 steps")
