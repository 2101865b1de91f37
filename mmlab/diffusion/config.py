"""Settings of noise processes and samplers (conf/process, conf/sampler)."""

from dataclasses import dataclass, field
from typing import Any

from mmlab.config.fields import Settings, choice, number, section


@dataclass
class DiffusionConfig(Settings):
    _target_: str = "mmlab.diffusion.process.Diffusion"
    schedule: str = choice("linear", "scaled_linear", "cosine")
    timesteps: int = number(1000, above=1)
    target: str = choice("epsilon", "x0", "v")
    beta_start: float | None = None
    beta_end: float | None = None
    zero_terminal_snr: bool = False
    min_snr_gamma: float | None = number(None, above=0)


@dataclass
class FlowMatchingConfig(Settings):
    _target_: str = "mmlab.diffusion.flow.FlowMatching"
    density: str = choice("uniform", "logit_normal")
    shift: float = number(1.0, above=0)
    target: str = choice("v", "x0")


@dataclass
class GuidanceConfig(Settings):
    scale: float = number(1.0, at_least=0)
    interval: list[float] | None = None  # lowest and highest time within which to guide
    rescale: float = number(0.0, at_least=0, at_most=1)


@dataclass
class ClipConfig(Settings):
    _target_: str = "mmlab.diffusion.guidance.Clip"
    limit: float = number(1.0, above=0)
    percentile: float | None = number(None, above=0, at_most=1)


@dataclass
class SamplerConfig(Settings):
    _target_: str = "mmlab.diffusion.samplers.Sampler"
    name: str = choice("ddim", "ddpm", "dpmpp_2m", "euler", "heun")
    steps: int = number(50, above=0)
    spacing: str = choice("trailing", "linspace", "leading")
    clip: Any = section("sampler/clip", default=None)  # bounds for pixels; latents have none
    eta: float | None = number(None, at_least=0, at_most=1)
    variance: str | None = None
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
