"""Our noise processes as diffusers' schedulers."""

from typing import Any

from mmlab.config.errors import ConfigError
from mmlab.diffusion.flow import FlowMatching
from mmlab.diffusion.process import Diffusion, NoiseProcess
from mmlab.diffusion.schedule import BETAS

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
TARGETS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


def scheduler(process: NoiseProcess) -> Any:
    """A DDIM scheduler that samples as `ddim` does, or Euler's of flow matching, as `euler`.

    Nothing is clipped, for latents have no bounds. DDIM's steps are ours where their number divides T; where not,
    diffusers jumps to other timesteps than those that it visits next.

    Raises:
        ConfigError: flow matching that predicts x_0, or a process of one's own.
    """
    if isinstance(process, Diffusion):
        return _ddim(process)
    if isinstance(process, FlowMatching) and process.target == "v":
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=process.shift)
    kind = f"{type(process).__name__} with target={process.target}"
    raise ConfigError(f"diffusers has no scheduler for {kind}; Diffusion, and FlowMatching with target=v, have one.")


def _ddim(process: Diffusion) -> Any:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    settings: dict[str, Any] = {
        "num_train_timesteps": process.timesteps,
        "beta_schedule": SCHEDULES[process.schedule],
        "prediction_type": TARGETS[process.target],
        "rescale_betas_zero_snr": process.zero_terminal_snr,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,  # trailing grids have none, but StableDiffusionPipeline complains about 0
    }
    if own := BETAS[process.schedule]:
        settings |= {"beta_start": process.beta_start or own[0], "beta_end": process.beta_end or own[1]}
    return DDIMScheduler(**settings)
