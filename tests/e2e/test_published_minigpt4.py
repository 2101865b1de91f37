"""MiniGPT-4's recipes have the published parameter counts and settings.

The expected settings are from the paper and its repository's training configs, the counts follow from the
architectures' published sizes; nothing here is read from conf/.
"""

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from mmlab.config.build import build
from mmlab.config.compose import compose, conf_dir
from mmlab.data.config import Prompt
from mmlab.training.trainable import count_parameters, set_trainable

MODELS = ("vicuna_7b", "vicuna_13b", "llama2_7b")
RECIPES = [f"{model}_stage{stage}" for model in MODELS for stage in (1, 2)]
# Llama 7B and 13B; Vicuna v0 has one more token, which adds a row to the embeddings and one to the head.
LANGUAGE = {
    "vicuna_7b": 6_738_415_616 + 2 * 4096,
    "vicuna_13b": 13_015_864_320 + 2 * 5120,
    "llama2_7b": 6_738_415_616,
}
LINEAR = {"vicuna_7b": 769 * 4096, "vicuna_13b": 769 * 5120, "llama2_7b": 769 * 4096}
SOURCE = {
    "vicuna_7b": "Vision-CAIR/vicuna-7b",
    "vicuna_13b": "Vision-CAIR/vicuna",
    "llama2_7b": "meta-llama/Llama-2-7b-chat-hf",
}


def eva_vit_g() -> int:
    """39 of ViT-g/14's 40 blocks: width 1408, inner width 6144, a class token; and the norm after them."""
    width, inner, blocks, patch, pixels = 1408, 6144, 39, 14, 224
    attention = 4 * (width * width + width)
    mlp = width * inner + inner + inner * width + width
    embeddings = width + 3 * patch * patch * width + width + ((pixels // patch) ** 2 + 1) * width
    return embeddings + blocks * (attention + mlp + 4 * width) + 2 * width


def query_half() -> int:
    """BLIP-2's Q-Former without its texts: 12 layers of width 768, six with cross-attention to width 1408."""
    width, inner, reads, norm = 768, 3072, 1408, 2 * 768
    square = width * width + width
    layers = 12 * (4 * square + norm + width * inner + inner + inner * width + width + norm)
    crossing = 6 * (2 * square + 2 * (reads * width + width) + norm)
    return layers + crossing + norm + 32 * width + 2 * reads


def test_the_formulas_give_the_published_sizes():
    """A billion for ViT-g/14's 40 blocks; BLIP-2 says 188M for the Q-Former with its texts."""
    block = eva_vit_g() // 39
    assert round((eva_vit_g() + block) / 1e9, 2) == 1.01
    embeddings, head = (30523 + 512) * 768, 768 * 768 + 3 * 768 + 30523
    texts = embeddings + head + 12 * (768 * 3072 + 3072 + 3072 * 768 + 768 + 2 * 768)
    assert abs(query_half() + texts - 188e6) < 0.01 * 188e6


def test_every_published_recipe_is_checked_here():
    files = {path.stem for path in (conf_dir() / "experiment" / "minigpt4").glob("*.yaml")}
    assert {name for name in files if not name.endswith("_tiny")} == set(RECIPES)


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request) -> tuple[str, int, DictConfig]:
    model, stage = request.param.rsplit("_stage", 1)
    return model, int(stage), compose("train", [f"experiment=minigpt4/{request.param}"])


def test_only_the_linear_layer_is_trained(recipe):
    name, _, cfg = recipe
    with torch.device("meta"):
        model = build(cfg.model)
    assert set_trainable(model, list(cfg.stage.trainable)) == ["vision", "qformer", "language"]
    assert count_parameters(model) == {
        "vision": {"trainable": 0, "frozen": eva_vit_g()},
        "qformer": {"trainable": 0, "frozen": query_half()},
        "connector": {"trainable": LINEAR[name], "frozen": 0},
        "language": {"trainable": 0, "frozen": LANGUAGE[name]},
    }
    assert all(p.device.type == "meta" for p in model.parameters())
    assert (model.tokens_per_image, model.vision.tokens_per_image) == (32, 257)


def test_the_settings_are_the_published_ones(recipe):
    name, stage, cfg = recipe
    lr, least, warmup, steps, batch = {1: (1e-4, 8e-5, 5000, 20000, 256), 2: (3e-5, 1e-5, 200, 1000, 12)}[stage]
    assert (cfg.optim.lr, cfg.optim.min_lr, cfg.optim.schedule) == (lr, least, "cosine")
    assert (cfg.optim.warmup_ratio * steps, cfg.trainer.max_steps, cfg.data.global_batch) == (warmup, steps, batch)
    assert (cfg.optim.weight_decay, list(cfg.optim.betas), cfg.trainer.gradient_clip_val) == (0.05, [0.9, 0.999], None)
    prompt = Prompt(**OmegaConf.to_container(cfg.stage.prompt))  # type: ignore[arg-type]
    if stage == 1:
        assert prompt == Prompt("plain", captions="blip", requests="minigpt4")
    else:
        template = "minigpt4_llama_2" if name == "llama2_7b" else "minigpt4"
        assert prompt == Prompt(template, turns="caption", requests="minigpt4")


def test_the_parts_and_the_chain_are_the_published_ones(recipe):
    name, stage, cfg = recipe
    assert cfg.model.vision.source == cfg.model.qformer.source == "Salesforce/blip2-flan-t5-xxl"
    assert (cfg.model.language.source, cfg.model.qformer.queries) == (SOURCE[name], 32)
    assert list(cfg.stage.init_from) == ([] if stage == 1 else [f"minigpt4/{name}_stage1"])
    assert cfg.data.root == ("data/laion_cc_sbu" if stage == 1 else "data/cc_sbu_align")
    weights = {source.path: source.weight for source in cfg.data.train}
    assert weights == ({"laion": 115, "cc_sbu": 14} if stage == 1 else {"train": None})
    devices = 8 if stage == 1 else 1
    assert cfg.data.global_batch % (devices * cfg.data.micro_batch) == 0
