"""From a config to a stage whose parts are filled and checked, and to what its model does."""

import pytest
import torch

from mmlab.config.build import build
from mmlab.config.compose import compose
from mmlab.config.errors import ConfigError
from mmlab.stage.assembly import build_stage, kind_of
from mmlab.training.artifacts import save_parts


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
