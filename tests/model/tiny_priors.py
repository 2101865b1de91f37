"""Priors with random weights over 4 x 4 codes of images of 16 pixels: unconditional, by class, text or map."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmlab.model.code_gpt import CodeGPT
from mmlab.model.code_prior_model import CodePriorModel
from mmlab.model.code_sampling import CodeSampler
from mmlab.model.conditioner import ClassCondition, Condition, Conditioner, MapCondition, NoCondition, TextCondition
from mmlab.model.config import (
    ClassConditionConfig,
    CodeGPTConfig,
    CodeSamplerConfig,
    MapConditionConfig,
    TextConditionConfig,
)
from tests.model import tiny_autoencoders as tiny

CODES, SIDE = 16, 4
NAMES = ("circle", "square", "star")
KINDS = ("none", "class", "context", "text", "hidden", "map")
"""`context`: a class as a token in front; `hidden`: texts with masked padding."""


def conditioner(kind: str, tokenizer: Any = None) -> Conditioner:
    if kind in ("text", "hidden"):
        fields = {"model_type": "bert", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
        fields |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = TextConditionConfig(
            init="random", architecture={**fields, "num_attention_heads": 2}, tokenizer=str(tokenizer), max_length=6
        )
        return TextCondition(replace(config, dropout=0.5, hide_padding=kind == "hidden"))
    made = {
        "none": NoCondition,
        "class": lambda: ClassCondition(ClassConditionConfig(classes=NAMES, width=20, dropout=0.5)),
        "context": lambda: ClassCondition(ClassConditionConfig(classes=NAMES, width=20, dropout=0.5, as_context=True)),
        "map": lambda: MapCondition(MapConditionConfig(codes=CODES, width=12, dropout=0.5)),
    }
    return made[kind]()


def prior_model(kind: str = "class", tokenizer: Any = None, codes: int = CODES, **sizes: Any) -> CodePriorModel:
    """The same random weights each time, large enough that every condition makes a difference."""
    config = CodeGPTConfig(**{"side": SIDE, "depth": 2, "width": 32, "heads": 2, **sizes})
    maps = tiny.vq() if kind == "map" else None
    first_stage, conditioning = tiny.vq(codes=codes), conditioner(kind, tokenizer)
    torch.manual_seed(1)
    model = CodePriorModel(first_stage, conditioning, partial(CodeGPT, config), maps)
    for stage in (model.first_stage, model.map_stage):
        if stage is not None:
            stage.untrained = False
    return louder(model)


@torch.no_grad()
def louder(model: CodePriorModel) -> CodePriorModel:
    for weight in [*model.prior.parameters(), *model.conditioner.parameters()]:
        weight.add_(0.1 * torch.randn(weight.shape))
    return model.eval()


def given(model: CodePriorModel, count: int = 3, side: int = SIDE) -> dict[str, Tensor]:
    """A batch's fields for the conditioner."""
    conditioner: Any = model.conditioner
    if conditioner.reads == "class":
        return {"labels": torch.arange(count) % len(NAMES)}
    if conditioner.reads == "text":
        return conditioner.tokenize(["red circle", "what color is the red circle?", ""][:count])
    if conditioner.reads == "map":
        drawn = torch.Generator().manual_seed(5)
        return {"map_codes": torch.randint(CODES, (count, side, side), generator=drawn)}
    return {}


def conditions(model: CodePriorModel, count: int = 3, side: int = SIDE) -> tuple[Condition, Condition]:
    """A condition and its null."""
    fields = given(model, count, side)
    return model.condition(fields), model.condition(fields, torch.ones(count, dtype=torch.bool))


def some_codes(count: int = 3, places: int = SIDE * SIDE, codes: int = CODES) -> Tensor:
    return torch.randint(codes, (count, places), generator=torch.Generator().manual_seed(2))


def sampling(**settings: Any) -> CodeSampler:
    return CodeSampler(CodeSamplerConfig(**settings))
