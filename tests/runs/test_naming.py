import pytest

from mmlab.config.compose import compose
from mmlab.runs.naming import run_name, sweep_name
from mmlab.stage.config import ContrastivePretrainingConfig
from tests.config.tiny_conf import write_conf

CHOICES = {"experiment": "llava/align_tiny", "model": "llava", "stage": "align"}
RECIPE = "experiment=llava/align_tiny"


def test_a_run_is_named_after_its_recipe():
    assert run_name(CHOICES, [RECIPE]) == "llava-align_tiny"
    assert run_name({"model": "llava", "stage": "align"}, ["model=llava", "stage=align"]) == "llava-align"
    assert run_name({"model": "???", "stage": "align"}, []) is None


def test_what_changes_the_result_changes_the_name():
    plain = run_name(CHOICES, [RECIPE])
    changed = run_name(CHOICES, [RECIPE, "optim.lr=1"])
    assert changed is not None and changed.startswith(f"{plain}-") and len(changed) == len(f"{plain}-") + 8
    assert run_name(CHOICES, ["optim.lr=1", RECIPE]) == changed
    assert run_name(CHOICES, ["optim.lr=2", RECIPE, "optim.lr=1"]) == changed
    assert run_name(CHOICES, [RECIPE, "optim.lr=2"]) != changed
    assert run_name(CHOICES, [RECIPE, "model=other"]) != plain


@pytest.mark.parametrize(
    "override",
    [
        "run.root=/x",
        "hydra.run.dir=x",
        "trainer=ddp",
        "trainer.devices=2",
        "trainer=fsdp",
        "trainer.strategy=fsdp",
        "trainer.fsdp.hold_reduction=true",
        "callbacks.progress.peak_tflops=312",
        "callbacks.picture_use=null",
        "data.workers=4",
        "data.micro_batch=1",
        "data.bad_budget=0.2",
    ]
    + ["logger=wandb", "logger.project=x", "hydra/launcher=basic", "trainer.num_nodes=2"],
)
def test_execution_keys_do_not_change_the_name(override):
    assert run_name(CHOICES, [RECIPE, override]) == "llava-align_tiny"


@pytest.mark.parametrize("recipe", ["llava/vision_tiny", "minigpt4/qformer_tiny", "taming/vqgan_tiny"])
def test_the_micro_batch_counts_if_its_samples_are_compared(recipe):
    def name(*overrides: str) -> str:
        return compose("train", [f"experiment={recipe}", *overrides]).run.name

    plain = name()
    assert plain == recipe.replace("/", "-") == name("trainer.devices=2", "data.workers=1")
    assert name("data.micro_batch=16") not in (plain, name("data.micro_batch=8"))
    swept = [RECIPE, "seed=1,2"]
    assert sweep_name(CHOICES, [*swept, "data.micro_batch=4"], ContrastivePretrainingConfig) != sweep_name(
        CHOICES, swept
    )


def test_similar_keys_change_the_name():
    assert run_name(CHOICES, [RECIPE, "trainer.precision=bf16-true"]) != "llava-align_tiny"
    assert run_name(CHOICES, [RECIPE, "trainer.max_steps=9"]) != "llava-align_tiny"
    assert run_name(CHOICES, [RECIPE, "run_length=9"]) != "llava-align_tiny"


def test_a_name_on_the_command_line_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    conf = write_conf(tmp_path / "tree")
    assert compose("train", [RECIPE, "run.name=mine", "seed=4"], conf).run.dir == "runs/mine"
    assert compose("train", [RECIPE], conf).run.dir == "runs/llava-align_tiny"


def test_a_point_has_the_same_name_outside_the_sweep():
    for typed, swept in (("optim.lr=1e-3", "optim.lr=0.001"), ("data.pack=true", "data.pack=True")):
        assert run_name(CHOICES, [RECIPE, typed]) == run_name(CHOICES, [RECIPE, swept])
    assert run_name(CHOICES, [RECIPE, "run.sweep=x", "sweep.metric=y"]) == "llava-align_tiny"


def test_a_sweep_is_named_after_its_overrides():
    name = sweep_name(CHOICES, [RECIPE, "optim.lr=1,2"])
    assert name.startswith("llava-align_tiny-sweep-")
    assert sweep_name(CHOICES, ["optim.lr=1,2", "hydra/launcher=joblib", "trainer.devices=2", RECIPE]) == name
    assert sweep_name(CHOICES, [RECIPE, "optim.lr=1,2,3"]) != name
    assert sweep_name(CHOICES, [RECIPE, "optim.lr=1,2", "seed=1"]) != name
    workers = [sweep_name(CHOICES, [RECIPE, f"data.workers={values}"]) for values in ("0,1", "0,2")]
    assert workers[0] != workers[1]
    assert sweep_name({}, ["model=a,b", "stage=align"]).startswith("sweep-")
