"""LLaVA's published recipes have the published parameter counts and settings.

The expected settings are from the papers and training scripts of LLaVA and LLaVA-1.5, the counts follow from the
architectures' published sizes; nothing here is read from conf/.
"""

from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from mmlab.config.build import build
from mmlab.config.compose import compose, conf_dir
from mmlab.data.config import Prompt
from mmlab.training.lora import add_adapters
from mmlab.training.trainable import count_parameters, set_trainable

CC3M, INSTRUCT, SCIENCE, LCS, MIX = (
    "cc3m_595k", "llava_instruct_158k", "scienceqa", "lcs_558k", "llava_mix_665k",
)  # fmt: skip
# data, lr, global batch, epochs, template
STAGES = {
    ("v1", "align"): (CC3M, 2e-3, 128, 1, "plain"),
    ("v1", "finetune"): (INSTRUCT, 2e-5, 32, 3, "v1"),
    ("v1", "scienceqa"): (SCIENCE, 2e-5, 128, 12, "v1"),
    ("v15", "align"): (LCS, 1e-3, 256, 1, "plain"),
    ("v15", "finetune"): (MIX, 2e-5, 128, 1, "v1"),
    ("v15", "lora"): (MIX, 2e-4, 128, 1, "v1"),
}
NEXT = {f"next_7b_{language}_{stage}" for language in ("vicuna", "mistral") for stage in ("align", "finetune")}
RECIPES = [f"{version}_{size}_{stage}" for version, stage in STAGES for size in ("7b", "13b")]


def clip_vit_l14(pixels: int) -> int:
    """ViT-L/14: 24 layers of width 1024 and inner width 4096, a class token, a norm before and after."""
    width, inner, layers, patch = 1024, 4096, 24, 14
    norm = 2 * width
    attention = 4 * (width * width + width)
    mlp = width * inner + inner + inner * width + width
    embeddings = width + 3 * patch * patch * width + ((pixels // patch) ** 2 + 1) * width  # patches have no bias
    return embeddings + norm + layers * (attention + mlp + 2 * norm) + norm


def llama(width: int, inner: int, layers: int, vocabulary: int = 32000) -> int:
    """Llama 1 and 2 without grouped queries: no bias, three matrices in an MLP, embeddings not tied."""
    return 2 * vocabulary * width + layers * (4 * width**2 + 3 * width * inner + 2 * width) + width


def adapter(width: int, inner: int, layers: int, rank: int = 128) -> int:
    """Two matrices for each of the four of attention and the three of an MLP."""
    return rank * layers * (4 * 2 * width + 3 * (width + inner))


LANGUAGE = {"7b": 6_738_415_616, "13b": 13_015_864_320}
WIDTH = {"7b": 4096, "13b": 5120}
VISION = {"v1": clip_vit_l14(224), "v15": clip_vit_l14(336)}
ADAPTER = {"7b": 319_815_680, "13b": 500_695_040}
IMAGE_TOKENS = {"v1": 256, "v15": 576}


def connector(version: str, size: str) -> int:
    first, width = (1024 + 1) * WIDTH[size], WIDTH[size]
    return first if version == "v1" else first + (width + 1) * width


def test_the_formulas_give_the_published_counts():
    assert llama(4096, 11008, 32) == LANGUAGE["7b"]
    assert llama(5120, 13824, 40) == LANGUAGE["13b"]
    assert VISION == {"v1": 303_179_776, "v15": 303_507_456}
    assert adapter(4096, 11008, 32) == ADAPTER["7b"]
    assert adapter(5120, 13824, 40) == ADAPTER["13b"]


def test_every_published_recipe_is_checked_here():
    files = {path.stem for path in (conf_dir() / "experiment" / "llava").glob("*.yaml")}
    assert {name for name in files if not name.endswith("_tiny")} == {*RECIPES, *NEXT}


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request) -> tuple[list[str], DictConfig]:
    return request.param.split("_"), compose("train", [f"experiment=llava/{request.param}"])


def test_trainable_and_frozen_parameters(recipe):
    (version, size, stage), cfg = recipe
    lora: Any = OmegaConf.to_object(cfg.stage.lora)
    with torch.device("meta"):
        model = build(cfg.model)
        set_trainable(model, list(cfg.stage.trainable), lora)
        add_adapters(model, lora)
    trainable = ["connector"] if stage == "align" else ["connector", "language"]
    sizes = {"vision": VISION[version], "connector": connector(version, size), "language": LANGUAGE[size]}
    counts = {
        part: {"trainable": count * (part in trainable), "frozen": count * (part not in trainable)}
        for part, count in sizes.items()
    }
    if stage == "lora":
        counts["language"] = {"trainable": ADAPTER[size], "frozen": LANGUAGE[size]}
    assert count_parameters(model) == counts
    assert list(cfg.stage.trainable) == trainable
    assert all(p.device.type == "meta" for p in model.parameters())
    assert model.vision.tokens_per_image == IMAGE_TOKENS[version]
    assert (model.vision.settings.feature_layer, model.vision.keep_class) == (-2, False)


def test_the_settings_are_the_published_ones(recipe):
    (version, _, stage), cfg = recipe
    data, lr, batch, epochs, template = STAGES[version, stage]
    assert cfg.data.root == f"data/{data}"
    assert (cfg.optim.lr, cfg.data.global_batch, cfg.trainer.max_epochs) == (lr, batch, epochs)
    assert cfg.trainer.max_steps is None
    assert (cfg.optim.schedule, cfg.optim.warmup_ratio, cfg.optim.min_lr) == ("cosine", 0.03, 0.0)
    rates = {"connector": 2e-5} if recipe[0][2] == "lora" else {}
    assert (cfg.optim.weight_decay, list(cfg.optim.betas), cfg.optim.part_lr) == (0.0, [0.9, 0.999], rates)
    adapters = {name: (own.rank, own.alpha, own.dropout, own.targets) for name, own in cfg.stage.lora.items()}
    assert adapters == ({"language": (128, 256, 0.05, "all-linear")} if rates else {})
    assert cfg.data.max_length == 2048
    assert "bf16" in cfg.trainer.precision
    prompt = Prompt(**OmegaConf.to_container(cfg.stage.prompt))  # type: ignore[arg-type]
    assert prompt == Prompt(template, pictures="tokens", supervise="answers", system=None)


def test_the_parts_and_the_chain_are_the_published_ones(recipe):
    (version, size, stage), cfg = recipe
    vision, language = {
        "v1": ("openai/clip-vit-large-patch14", f"lmsys/vicuna-{size}-v1.3"),
        "v15": ("openai/clip-vit-large-patch14-336", f"lmsys/vicuna-{size}-v1.5"),
    }[version]
    assert (cfg.model.vision.source, cfg.model.language.source) == (vision, language)
    assert cfg.data.aspect == ("crop" if version == "v1" else "pad")
    # ScienceQA starts from stage 1, without stage 2.
    assert list(cfg.stage.init_from) == ([] if stage == "align" else [f"llava/{version}_{size}_align"])


def test_the_global_batch_divides_on_eight_devices(recipe):
    _, cfg = recipe
    assert cfg.data.global_batch % (8 * cfg.data.micro_batch) == 0


def mistral(width: int, inner: int, layers: int, groups: int, vocabulary: int = 32000) -> int:
    """As `llama`, with keys and values of a part of the width."""
    attention = 2 * width**2 + 2 * width * groups
    return 2 * vocabulary * width + layers * (attention + 3 * width * inner + 2 * width) + width


@pytest.mark.parametrize("name", sorted(NEXT))
def test_llava_next(name):
    """Counts, settings and parts; what was not released is that of the scripts which the headers name."""
    _, _, language, stage = name.split("_")
    cfg, tuned = compose("train", [f"experiment=llava/{name}"]), stage == "finetune"
    with torch.device("meta"):
        model = build(cfg.model)
        set_trainable(model, list(cfg.stage.trainable))
    sizes = {"vision": VISION["v15"], "connector": 20_979_712}  # published: 303.5M and 21M
    assert mistral(4096, 14336, 32, 1024) == 7_241_732_096
    sizes["language"] = {"vicuna": LANGUAGE["7b"], "mistral": 7_241_732_096}[language]
    sizes |= {"newline": 4096} if tuned else {}
    learns = sizes if tuned else {"connector"}
    counts = {p: {"trainable": n * (p in learns), "frozen": n * (p not in learns)} for p, n in sizes.items()}
    if tuned:  # the last layer, which nothing reads, and the norm after it
        counts["vision"] = {"trainable": VISION["v15"] - 12_598_272, "frozen": 12_598_272}
    assert count_parameters(model) == counts
    assert language == "mistral" or round(sum(sizes.values()) / 1e9, 2) == 7.06  # as the model card has it
    data, lr, batch = ("llava_next_779k", 1e-5, 128) if tuned else (LCS, 1e-3, 256)
    assert (cfg.data.root, cfg.optim.lr, cfg.data.global_batch) == (f"data/{data}", lr, batch)
    assert (cfg.optim.part_lr, cfg.trainer.max_epochs) == ({"vision": 2e-6} if tuned else {}, 1)
    assert (cfg.data.aspect, cfg.data.max_length) == (("anyres", 4096) if tuned else ("crop", 2048))
    assert cfg.data.grids == [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
    template = {"vicuna": "v1", "mistral": "mistral"}[language] if tuned else "plain"
    assert cfg.stage.prompt.template == template
    source = {"vicuna": "lmsys/vicuna-7b-v1.5", "mistral": "mistralai/Mistral-7B-Instruct-v0.2"}[language]
    assert (cfg.model.vision.source, cfg.model.language.source) == ("openai/clip-vit-large-patch14-336", source)
    assert list(cfg.stage.init_from) == ([f"llava/next_7b_{language}_align"] if tuned else [])
    assert cfg.data.global_batch % (8 * cfg.data.micro_batch) == 0
