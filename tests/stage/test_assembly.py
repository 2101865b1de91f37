"""From a config to a stage whose parts are filled and checked, and to what its model does."""

import pytest
import torch

from mmlab.config.build import build
from mmlab.config.compose import compose
from mmlab.config.errors import ConfigError
from mmlab.stage.assembly import build_stage, kind_of
from mmlab.training.artifacts import save_parts
from mmlab.weights import content_hash
from tests.model import tiny


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (["experiment=llava/finetune_tiny"], "answers"),
        (["experiment=llava/align_tiny"], "describes"),
        (["experiment=minigpt4/stage2_tiny"], "describes"),
        (["experiment=llava/language_tiny"], "writes"),
        (["experiment=llava/vision_tiny"], "compares"),
        (["experiment=minigpt4/qformer_tiny"], "compares"),
        (["experiment=ldm/first_stage_vq_tiny"], "reconstructs"),
        (["experiment=ldm/class_tiny"], "draws"),
        (["experiment=taming/prior_tiny"], "draws"),
    ],
)
def test_what_the_model_of_a_run_does(overrides, kind):
    assert kind_of(compose("train", overrides)) == kind


def test_a_users_model_is_of_its_base_s_kind(tmp_path, monkeypatch):
    (tmp_path / "ownlab.py").write_text(
        "from torch import nn\nfrom mmlab.model.vlm import VisionLanguageModel\n"
        "class Ours(VisionLanguageModel): pass\nclass Other(nn.Module): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MMLAB_ALLOW_TARGETS", "ownlab")
    cfg = compose("train", ["experiment=llava/finetune_tiny"])
    for name, kind in (("Ours", "answers"), ("Other", "answers")):
        cfg.model._target_ = f"ownlab.{name}"
        assert kind_of(cfg) == kind
    cfg = compose("train", ["experiment=ldm/class_tiny"])
    cfg.model._target_ = "ownlab.Other"
    assert kind_of(cfg) == "draws"


def test_parts_are_filled_before_they_are_checked(tmp_path):
    overrides = ["experiment=ldm/class_tiny", f"run.root={tmp_path}", "trainer=cpu"]
    cfg = compose("train", [*overrides, "stage.init_from=[]"])
    with pytest.raises(ConfigError, match=r"set model\.first_stage\.source with model\.first_stage\.init=pre"):
        build_stage(cfg)
    first_stage = build(cfg.model.first_stage)
    std = torch.arange(1.0, 1 + first_stage.channels)
    first_stage.set_statistics(torch.zeros_like(std), std)
    save_parts(
        torch.nn.ModuleDict({"first_stage": first_stage}), ["first_stage"], tmp_path / "first" / "artifacts", {}, {}
    )
    (tmp_path / "first" / "config.yaml").write_text("{}")
    stage = build_stage(compose("train", [*overrides, f"stage.init_from=[{tmp_path / 'first'}]"]))
    assert torch.equal(stage.model.first_stage.latent_std, std) and stage.frozen == ["first_stage"]


def sources(folder, tokenizer, dtype=torch.float16):
    """Overrides that start a LLaVA recipe from a vision tower and a language model of a folder, with stored dtype."""
    for name, part in (("vision", tiny.vision("clip")), ("language", tiny.language(tokenizer))):
        (folder / name).mkdir()
        part.to(dtype).save(folder / name)
    return [
        f"model.{part}.{key}={value}"
        for part in ("vision", "language")
        for key, value in (("init", "pretrained"), ("source", folder / part))
    ] + [f"model.language.tokenizer={tokenizer}", "trainer=cpu", "stage.init_from=[]"]


@pytest.mark.parametrize(
    ("precision", "stage", "rounded"),
    [
        ("32-true", "align", set()),
        ("bf16-mixed", "align", {"vision", "language"}),
        ("bf16-mixed", "finetune", {"vision"}),
        ("bf16-true", "finetune", {"vision", "language"}),
    ],
)
def test_weights_are_read_in_the_dtype_in_which_they_are_used(tmp_path, tokenizer_folder, precision, stage, rounded):
    overrides = [f"experiment=llava/{stage}_tiny", *sources(tmp_path, tokenizer_folder)]
    model = build_stage(compose("train", [*overrides, f"trainer.precision={precision}"])).model
    whole = build_stage(compose("train", [*overrides, "trainer.precision=32-true"])).model
    for name in ("vision", "language"):
        parts = [each.get_submodule(name) for each in (model, whole)]
        dtype = torch.bfloat16 if name in rounded else torch.float32
        assert {weight.dtype for weight in parts[0].parameters()} == {dtype}, name
        assert torch.bfloat16 not in {buffer.dtype for buffer in parts[0].buffers()}, name
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(*(part.parameters() for part in parts), strict=True))
        assert content_hash(parts[0]) == content_hash(parts[1]), "a hash is of what was stored"
        assert content_hash(parts[0], trained=True) != content_hash(parts[1]) or name not in rounded


def test_a_sharded_run_reads_weights_as_stored(tmp_path, tokenizer_folder):
    """Which adapters, drawn in the dtype of the run, do not show."""
    lora = ["+stage.lora.language.rank=2", "trainer.precision=bf16-mixed"]
    overrides = ["experiment=llava/finetune_tiny", *sources(tmp_path, tokenizer_folder), *lora]
    stages = []
    for strategy in ("ddp", "fsdp"):
        torch.manual_seed(0)
        stages.append(build_stage(compose("train", [*overrides, f"trainer.strategy={strategy}"])))
    whole, sharded = (dict(stage.model.language.named_parameters()) for stage in stages)
    for name, weight in sharded.items():
        assert weight.dtype == (torch.float32 if ".lora_" in name else torch.float16), name
        assert torch.equal(weight.bfloat16(), whole[name].bfloat16()), name
        assert torch.equal(weight, whole[name]) or ".lora_" not in name, name


def test_the_model_of_a_stage_of_another_class_is_not_sharded(tmp_path, monkeypatch):
    (tmp_path / "plainlab.py").write_text(
        "from lightning import LightningModule\n"
        "class Plain(LightningModule):\n    def __init__(self, **options): super().__init__()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MMLAB_ALLOW_TARGETS", "plainlab")
    cfg = compose("train", ["experiment=ldm/first_stage_kl_tiny", "trainer=cpu", "trainer.strategy=fsdp"])
    cfg.stage._target_ = "plainlab.Plain"
    with pytest.raises(ConfigError, match=r"shards the model of an mmlab.stage.stage.Stage, which Plain is not"):
        build_stage(cfg)
