"""A run's noise process and sampler as diffusers' scheduler, and as the arguments of its pipelines' calls."""

from typing import Any

from mmlab.config.errors import ConfigError
from mmlab.diffusion.edm import EDM
from mmlab.diffusion.flow import FlowMatching
from mmlab.diffusion.guidance import Clip
from mmlab.diffusion.process import Diffusion, NoiseProcess
from mmlab.diffusion.samplers import Sampler
from mmlab.diffusion.schedule import BETAS

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
TARGETS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
ADVICE = "export with another one, such as sampler=ddim"


def scheduler(process: NoiseProcess, sampler: Sampler) -> Any:
    """Return the scheduler with which diffusers takes the steps that the sampler takes.

    `ddim`, `euler` (which equals DDIM without noise) and `ddpm` (DDIM with eta=1) become a `DDIMScheduler`, `dpmpp_2m`
    a `DPMSolverMultistepScheduler`, and Euler's steps of flow matching a `FlowMatchEulerDiscreteScheduler`. Those of
    EDM are an `EDMEulerScheduler` or an `EDMDPMSolverMultistepScheduler`. With a clip, DDIM's steps equal ours if
    `step` gets `use_clipped_model_output=True`: our noise is made consistent with the clipped x_0.

    Args:
        process: of the trained model.
        sampler: of the run, or another one.

    Raises:
        ConfigError: a process, a sampler, a spacing, a number of steps or a clip that diffusers does not have.
    """
    if not isinstance(sampler, Sampler):
        raise ConfigError(f"diffusers has no scheduler for {type(sampler).__name__}; {ADVICE}.")
    sampler.check(process)
    if isinstance(process, Diffusion):
        return _dpm_solver(process, sampler) if sampler.config.name == "dpmpp_2m" else _ddim(process, sampler)
    if isinstance(process, FlowMatching) and process.target == "v":
        return _flow(process, sampler)
    if isinstance(process, EDM):
        return _edm(process, sampler)
    kind = f"{type(process).__name__} with target={process.target}"
    raise ConfigError(
        f"diffusers has no scheduler for {kind}, only for Diffusion, EDM, and FlowMatching with target=v."
    )


def eta_of(sampler: Sampler) -> float:
    """Return the eta with which DDIM adds as much noise as the sampler."""
    return 1.0 if sampler.config.name == "ddpm" else sampler.own.get("eta", 0.0)


def call_arguments(sampler: Sampler) -> dict[str, Any]:
    """Return the settings that diffusers' pipelines take in each call."""
    guidance = sampler.guidance
    return {
        "num_inference_steps": sampler.config.steps,
        "guidance_scale": guidance.scale,
        "guidance_rescale": guidance.rescale,
        "guidance_interval": None if guidance.interval is None else list(guidance.interval),
        "eta": eta_of(sampler),
    }


def _flow(process: FlowMatching, sampler: Sampler) -> Any:
    if sampler.config.name not in ("ddim", "euler") or eta_of(sampler):
        noise = f" with eta={eta_of(sampler):g}" if sampler.config.name == "ddim" else ""
        raise ConfigError(
            f"diffusers takes Euler's steps of flow matching, but the sampler is {sampler.config.name}{noise}; export"
            " with sampler=euler."
        )
    if sampler.clip is not None:
        raise ConfigError(
            "diffusers' scheduler for flow matching cannot clip, but this run has a sampler.clip; export with"
            " sampler=euler sampler.clip=null."
        )
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=process.config.shift)


def _edm(process: EDM, sampler: Sampler) -> Any:
    config = process.config
    name = "dpmpp_2m" if sampler.config.name == "dpmpp_2m" else "euler"
    if sampler.config.name not in ("ddim", "euler", "dpmpp_2m") or eta_of(sampler) or sampler.clip is not None:
        raise ConfigError(
            f"diffusers has EDM's schedulers for Euler and DPM-Solver++ without noise and clip; export with"
            f" sampler={name} sampler.clip=null."
        )
    from diffusers.schedulers.scheduling_edm_dpmsolver_multistep import EDMDPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler

    kind = EDMDPMSolverMultistepScheduler if name == "dpmpp_2m" else EDMEulerScheduler
    return kind(sigma_min=config.sigma_min, sigma_max=config.sigma_max, sigma_data=config.sigma_data, rho=config.rho)


def _ddim(process: Diffusion, sampler: Sampler) -> Any:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    config, timesteps = sampler.config, process.config.timesteps
    spacing: Any = config.spacing
    if config.name not in ("ddim", "euler", "ddpm") or sampler.own.get("variance") == "forward":
        what = f"sampler {config.name}{' with variance=forward' if config.name == 'ddpm' else ''}"
        raise ConfigError(f"diffusers does not take the steps of {what}; {ADVICE}.")
    if spacing == "linspace" or timesteps % config.steps:
        what = f"{config.steps} steps" if timesteps % config.steps else "spacing=linspace"
        raise ConfigError(
            f"diffusers' DDIM jumps by {timesteps} // steps timesteps, which does not fit {what}; export with"
            f" sampler={config.name} sampler.spacing=trailing steps={_divisor(timesteps, config.steps)}."
        )
    return DDIMScheduler(
        **_noise(process),
        timestep_spacing=spacing,
        **_clipping(sampler.clip),
        set_alpha_to_one=True,
        # Leading spacing ends at timestep 0. Otherwise it is unused, but StableDiffusionPipeline replaces all but 1.
        steps_offset=0 if spacing == "leading" else 1,
    )


def _dpm_solver(process: Diffusion, sampler: Sampler) -> Any:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    if sampler.config.spacing != "trailing" or process.config.zero_terminal_snr:
        what = "zero_terminal_snr=true" if process.config.zero_terminal_snr else f"spacing={sampler.config.spacing}"
        raise ConfigError(f"diffusers' DPM-Solver++ takes other steps than sampler dpmpp_2m with {what}; {ADVICE}.")
    if sampler.clip is not None and sampler.clip.percentile is None:
        raise ConfigError(f"diffusers' DPM-Solver++ cannot clip to a fixed range, but this run does; {ADVICE}.")
    clipping = {name: value for name, value in _clipping(sampler.clip).items() if name != "clip_sample"}
    return DPMSolverMultistepScheduler(
        **_noise(process), timestep_spacing="trailing", steps_offset=1, final_sigmas_type="zero", **clipping
    )


def _noise(process: Diffusion) -> dict[str, Any]:
    """Return the fields of a scheduler that follow from the noise process."""
    config = process.config
    fields: dict[str, Any] = {
        "num_train_timesteps": config.timesteps,
        "beta_schedule": SCHEDULES[config.schedule],
        "prediction_type": TARGETS[process.target],
        "rescale_betas_zero_snr": config.zero_terminal_snr,
    }
    if own := BETAS.get(config.schedule):
        fields |= {"beta_start": config.beta_start or own[0], "beta_end": config.beta_end or own[1]}
    return fields


def _clipping(clip: Clip | None) -> dict[str, Any]:
    if clip is None:
        return {"clip_sample": False}
    if clip.percentile is None:
        return {"clip_sample": True, "clip_sample_range": clip.limit}
    if clip.limit != 1:
        raise ConfigError(
            f"diffusers' dynamic thresholding has the limit 1, but this run has sampler.clip.limit={clip.limit:g}."
        )
    # Our quantile has no upper bound; diffusers' default of 1 would make this a static clip.
    ratio = {"dynamic_thresholding_ratio": clip.percentile, "sample_max_value": 1e9}
    return {"clip_sample": False, "thresholding": True, **ratio}


def _divisor(timesteps: int, steps: int) -> int:
    """Return the divisor of `timesteps` that is closest to `steps`."""
    return min((n for n in range(1, timesteps + 1) if timesteps % n == 0), key=lambda n: abs(n - steps))
