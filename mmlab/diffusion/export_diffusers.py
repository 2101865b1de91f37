"""Our noise processes as diffusers' schedulers."""

from typing import Any

from mmlab.config.errors import ConfigError
from mmlab.diffusion.clipping import Clip
from mmlab.diffusion.flow import FlowMatching
from mmlab.diffusion.process import Diffusion, NoiseProcess
from mmlab.diffusion.schedule import BETAS

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
TARGETS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


def scheduler(process: NoiseProcess, clip: Clip | None = None) -> Any:
    """A DDIM scheduler that samples as `ddim` does, or Euler's of flow matching, as `euler`.

    DDIM's steps are ours where their number divides T; where not, diffusers jumps to other timesteps than those that it
    visits next. With a clip they are ours where `step` is given `use_clipped_model_output=True`: our noise moves with a
    clipped x_0.

    Args:
        process: that the model was trained with.
        clip: bounds on the predicted clean sample.

    Raises:
        ConfigError: flow matching that predicts x_0, a process of one's own, or a clip that diffusers does not have.
    """
    if isinstance(process, Diffusion):
        return _ddim(process, clip)
    if isinstance(process, FlowMatching) and process.target == "v":
        if clip is not None:
            raise ConfigError("diffusers' scheduler of flow matching clips nothing, and this run has a sampler.clip.")
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=process.shift)
    kind = f"{type(process).__name__} with target={process.target}"
    raise ConfigError(f"diffusers has no scheduler for {kind}; Diffusion, and FlowMatching with target=v, have one.")


def _ddim(process: Diffusion, clip: Clip | None) -> Any:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    settings: dict[str, Any] = {
        "num_train_timesteps": process.timesteps,
        "beta_schedule": SCHEDULES[process.schedule],
        "prediction_type": TARGETS[process.target],
        "rescale_betas_zero_snr": process.zero_terminal_snr,
        "timestep_spacing": "trailing",
        **_clipping(clip),
        "set_alpha_to_one": True,
        "steps_offset": 1,  # trailing grids have none, but StableDiffusionPipeline complains about 0
    }
    if own := BETAS[process.schedule]:
        settings |= {"beta_start": process.beta_start or own[0], "beta_end": process.beta_end or own[1]}
    return DDIMScheduler(**settings)


def _clipping(clip: Clip | None) -> dict[str, Any]:
    if clip is None:
        return {"clip_sample": False}
    if clip.percentile is None:
        return {"clip_sample": True, "clip_sample_range": clip.limit}
    if clip.limit != 1:
        raise ConfigError(
            f"diffusers' dynamic thresholding has the limit 1, and this run has sampler.clip.limit={clip.limit:g}."
        )
    # The quantile has no upper bound here; diffusers' default of 1 would make this a static clip.
    ratio = {"dynamic_thresholding_ratio": clip.percentile, "sample_max_value": 1e9}
    return {"clip_sample": False, "thresholding": True, **ratio}
