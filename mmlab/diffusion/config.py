"""Settings of noise processes and samplers (conf/process, conf/sampler)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from mmlab.config.fields import Settings, choice, number, section


@dataclass
class DiffusionConfig(Settings):
    _target_: str = "mmlab.diffusion.process.Diffusion"
    # linear in beta (DDPM), scaled_linear: linear in sqrt(beta) (latent diffusion, whose own code calls it "linear"),
    # cosine: arXiv 2102.09672, equation 17
    schedule: str = choice("linear", "scaled_linear", "cosine")
    timesteps: int = number(1000, above=1)
    # what the denoiser predicts; v = alpha * epsilon - sigma * x0. A sampler divides epsilon by alpha to find x0: under
    # cosine, whose last alpha is 5e-5, clip x0 or predict another target
    target: str = choice("epsilon", "x0", "v")
    beta_start: float | None = None  # null: the schedule's published value; cosine has none
    beta_end: float | None = None  # likewise
    zero_terminal_snr: bool = False  # rescale the schedule so that the last timestep is pure noise
    min_snr_gamma: float | None = number(None, above=0)  # gamma of the min-SNR loss weight (5 in its paper); null: 1


@dataclass
class FlowMatchingConfig(Settings):
    _target_: str = "mmlab.diffusion.flow.FlowMatching"
    density: str = choice("uniform", "logit_normal")  # of the training times
    # logit_normal: mean and standard deviation of ln(t / (1 - t)), before the shift; 0 and 1 in Stable Diffusion 3
    # (arXiv 2403.03206, section 3.1); a higher mean trains more on noisy images
    logit_mean: float = 0.0
    logit_std: float = number(1.0, above=0)
    shift: float = number(1.0, above=0)  # t' = shift * t / (1 + (shift - 1) * t); above 1, more noise: for large images
    target: str = choice("v", "x0")  # epsilon does not determine the image at t = 1, where sampling starts


@dataclass
class EDMConfig(Settings):
    _target_: str = "mmlab.diffusion.edm.EDM"
    # standard deviation of the data: 1 for normalized latents, 0.5 in the paper, for pixels in -1 ... 1
    sigma_data: float = number(1.0, above=0)
    # mean and standard deviation of ln(sigma) in training. The paper has -1.2 and 1.2, EDM2 -0.4 and 1, both for
    # sigma_data=0.5; the mean grows with ln(sigma_data), so -0.5 has the paper's signal-to-noise ratios
    p_mean: float = -0.5
    p_std: float = number(1.2, above=0)
    sigma_min: float = number(0.002, above=0)  # noise levels that samplers visit: from sigma_max to sigma_min
    sigma_max: float = number(80.0, above=0)
    rho: float = number(7.0, above=0)  # the higher, the more of these levels are low ones


@dataclass
class GuidanceConfig(Settings):
    scale: float = number(1.0, at_least=0)  # w in null + w * (conditional - null); 1: conditional, 0: unconditional
    # lowest and highest model time at which to guide (arXiv 2404.07724): timesteps of a diffusion, 1000 t of a flow,
    # 250 ln(sigma) of EDM; null: everywhere
    interval: list[float] | None = None
    # phi of arXiv 2305.08891: share of the guided output that is scaled back to the conditional output's standard
    # deviation per sample, against over-exposure at high scales
    rescale: float = number(0.0, at_least=0, at_most=1)


@dataclass
class ClipConfig(Settings):
    _target_: str = "mmlab.diffusion.guidance.Clip"
    limit: float = number(1.0, above=0)  # bound of the data's absolute values
    # null clamps; otherwise dynamic thresholding (Imagen, arXiv 2205.11487) at this quantile of a sample's |x0|
    percentile: float | None = number(None, above=0, below=1)


@dataclass
class SamplerConfig(Settings):
    draws_from: ClassVar[str] = "noise"
    _target_: str = "mmlab.diffusion.samplers.Sampler"
    name: str = choice("ddim", "ddpm", "dpmpp_2m", "euler", "heun")
    steps: int = number(50, above=0)  # noise levels to visit
    spacing: str = choice("trailing", "linspace", "leading")  # of the timesteps (arXiv 2305.08891, table 2)
    clip: Any = section("sampler/clip", default=None)  # bounds on the predicted x0, for pixels; latents have none
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    # Parameters that only some samplers have; null: the sampler's own default.
    eta: float | None = number(None, at_least=0, at_most=1)  # ddim: 0 is deterministic, 1 adds as much noise as ddpm
    # ddpm: posterior is exact if the data is a single point, forward for normally distributed data
    variance: str | None = choice("posterior", "forward", default=None)
