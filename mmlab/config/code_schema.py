"""The dataclasses of priors over the codes of a VQ first stage."""

from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import MISSING

from mmlab.config.fields import choice, number, section
from mmlab.config.stage_schema import StageConfig


@dataclass
class MapConditionConfig:
    _target_: str = "mmlab.model.conditioner.MapCondition"
    codes: int = number(MISSING, above=1)  # of the first stage of maps
    width: int = number(256, above=0)
    dropout: float = number(0.1, at_least=0, at_most=1)


@dataclass
class CodeGPTConfig:
    _target_: str = "mmlab.model.code_gpt.CodeGPT"
    _partial_: bool = True  # the model gives the number of codes and the condition's widths
    side: int = number(16, above=0)  # codes along a side: data.size over the first stage's factor
    depth: int = number(12, above=0)
    width: int = number(768, above=0)
    heads: int = number(12, above=0)
    positions: str = choice("learned", "rotary")
    dropout: float = number(0.0, at_least=0, at_most=1)


@dataclass
class CodePriorModelConfig:
    parts: ClassVar[tuple[str, ...]] = ("first_stage", "map_stage", "conditioner", "prior")
    _target_: str = "mmlab.model.code_prior_model.CodePriorModel"
    first_stage: Any = section("model/first_stage")
    conditioner: Any = section("model/conditioner")
    prior: Any = section("model/prior")
    map_stage: Any = None  # a first stage of maps, for a conditioner that reads them


@dataclass
class CodePriorConfig(StageConfig):
    writes_codes: ClassVar[bool] = True
    _target_: str = "mmlab.stage.code_prior.CodePrior"
    pkeep: float = number(1.0, at_least=0, at_most=1)  # share of the codes that are read as they are


@dataclass
class CodeSamplerConfig:
    writes_codes: ClassVar[bool] = True
    _target_: str = "mmlab.model.code_sampling.CodeSampler"
    temperature: float = number(1.0, at_least=0)  # 0: the likeliest code
    top_k: int | None = number(None, above=0)  # None: all
    top_p: float | None = number(None, above=0, at_most=1)  # None: all
    guidance: float = number(1.0, at_least=0)  # scale
