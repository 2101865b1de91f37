"""The noise process that the scheduler of a diffusers pipeline states."""

from collections.abc import Mapping
from typing import Any

from mmlab.config.errors import ConfigError
from mmlab.diffusion.edm import EDM, TIME_SCALE
from mmlab.diffusion.flow import FlowMatching
from mmlab.diffusion.process import Diffusion, NoiseProcess
from mmlab.diffusion.schedule import BETAS

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
TARGETS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
OTHERS = {
    "FlowMatchEulerDiscreteScheduler": (FlowMatching, "flow"),
    "EDMEulerScheduler": (EDM, "edm"),
    "EDMDPMSolverMultistepScheduler": (EDM, "edm"),
}
"""Schedulers of other processes than `Diffusion`: the process, and its option."""


def check_process(process: NoiseProcess, fields: Mapping[str, Any], source: str) -> None:
    """Compare a process with the one that a pipeline's denoiser was trained with.

    Args:
        process: of the run.
        fields: of the pipeline's scheduler, see `scheduler_of`; empty: nothing is compared.
        source: the pipeline, for messages.

    Raises:
        ConfigError: another process; the message names the key to set.
    """
    if not fields:
        return
    kind, option = OTHERS.get(str(fields.get("_class_name")), (Diffusion, "stable_diffusion"))
    if not isinstance(process, kind):
        raise _differs(source, f"{fields.get('_class_name')}", type(process).__name__, f"process={option}")
    if isinstance(process, EDM):
        _check_edm(process, fields, source)
    for key, stated in stated_settings(fields).items() if isinstance(process, Diffusion) else ():
        here = getattr(process.config, key)
        if here is None:  # the schedule's own
            here = BETAS[process.config.schedule][0 if key == "beta_start" else 1]
        if here != stated:
            value = str(stated).lower() if isinstance(stated, bool) else stated
            raise _differs(source, f"{key}={value}", f"process.{key}={here}", f"process.{key}={value}")


def _check_edm(process: EDM, fields: Mapping[str, Any], source: str) -> None:
    deviation = fields.get("sigma_data", 0.5)
    if deviation != process.config.sigma_data:
        key = "process.sigma_data"
        raise _differs(source, f"sigma_data={deviation}", f"{key}={process.config.sigma_data}", f"{key}={deviation}")
    if fields.get("time_scale", 1) != TIME_SCALE or fields.get("prediction_type", "epsilon") != "epsilon":
        raise ConfigError(
            f"model.denoiser.source={source} has another time or target than {TIME_SCALE} c_noise and F of process=edm,"
            " as its pipeline says; name the denoiser's own folder in it as the source, to train it for these."
        )


def stated_settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `Diffusion` that a scheduler's config states."""
    settings: dict[str, Any] = {"target": TARGETS.get(fields.get("prediction_type") or "epsilon")}
    if fields.get("trained_betas") is None:
        schedule = SCHEDULES.get(fields.get("beta_schedule", "linear"))
        settings |= {"schedule": schedule, "timesteps": fields.get("num_train_timesteps", 1000)}
        if schedule in BETAS:
            settings |= {name: fields.get(name) for name in ("beta_start", "beta_end")}
    settings["zero_terminal_snr"] = bool(fields.get("rescale_betas_zero_snr", False))
    return {name: value for name, value in settings.items() if value is not None}


def _differs(source: str, theirs: str, ours: str, fix: str) -> ConfigError:
    return ConfigError(
        f"model.denoiser.source={source} was trained with {theirs}, as its scheduler says, not {ours}; set {fix}, or "
        "name the denoiser's own folder in the pipeline as the source, to train it for another process."
    )
