"""A pipeline's scheduler states the process that its denoiser was trained with."""

from typing import Any

import pytest

from mmlab.config.errors import ConfigError
from mmlab.diffusion.config import DiffusionConfig, EDMConfig, FlowMatchingConfig
from mmlab.diffusion.edm import EDM
from mmlab.diffusion.flow import FlowMatching
from mmlab.diffusion.process import Diffusion
from mmlab.diffusion.stated_process import check_process

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD15 = {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "trained_betas": None, **BETAS}
SD21 = {**SD15, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
STABLE = {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        (SD15, STABLE),
        (SD21, {**STABLE, "target": "v"}),
        ({**SD21, "rescale_betas_zero_snr": True}, {**STABLE, "target": "v", "zero_terminal_snr": True}),
        ({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}, {}),
        ({**SD15, "beta_start": 0.0015, "beta_end": 0.0195}, {"schedule": "scaled_linear"}),
        ({"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}, {"schedule": "cosine", "target": "x0"}),
        ({}, {"target": "x0"}),
    ],
)
def test_the_same_process_passes(fields, settings):
    check_process(Diffusion(DiffusionConfig(**settings)), fields, "here")


@pytest.mark.parametrize(
    ("fields", "settings", "theirs", "ours", "fix"),
    [
        (SD21, STABLE, "target=v", "process.target=epsilon", "process.target=v"),
        (SD15, {**STABLE, "target": "v"}, "target=epsilon", "process.target=v", "process.target=epsilon"),
        (SD15, {}, "schedule=scaled_linear", "process.schedule=linear", "process.schedule=scaled_linear"),
        (SD15, {"schedule": "scaled_linear"}, "beta_start=0.00085", "process.beta_start=0.0015", "beta_start=0.00085"),
        (
            SD21,
            {**STABLE, "target": "v", "zero_terminal_snr": True},
            "zero_terminal_snr=false",
            "process.zero_terminal_snr=True",
            "process.zero_terminal_snr=false",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, STABLE, "FlowMatchEuler", "Diffusion", "process=flow"),
    ],
)
def test_another_process_is_refused_with_the_key_to_set(fields, settings, theirs, ours, fix):
    with pytest.raises(ConfigError) as error:
        check_process(Diffusion(DiffusionConfig(**settings)), fields, "here")
    assert f"model.denoiser.source=here was trained with {theirs}" in str(error.value)
    assert f"not {ours}; set" in str(error.value) and fix in str(error.value)


def test_flow_matching_is_no_diffusion():
    process: Any = FlowMatching(FlowMatchingConfig())
    check_process(process, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "here")
    with pytest.raises(ConfigError, match=r"PNDMScheduler.* not FlowMatching; set process=stable_diffusion"):
        check_process(process, SD15, "here")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (SD15, r"PNDMScheduler.* not EDM; set process=stable_diffusion"),
        ({"sigma_data": 0.5, "time_scale": 1000}, r"sigma_data=0.5, .* not process.sigma_data=1.0; set process.sigma"),
        ({"sigma_data": 1.0}, "another time or target than 1000 c_noise and F"),
        ({"sigma_data": 1.0, "time_scale": 1000, "prediction_type": "v_prediction"}, "another time or target"),
    ],
)
def test_edm_has_a_deviation_and_a_time_of_its_own(fields, says):
    exported = {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "time_scale": 1000}
    check_process(EDM(EDMConfig()), exported, "here")
    with pytest.raises(ConfigError, match=says):
        check_process(EDM(EDMConfig()), {"_class_name": "EDMEulerScheduler", **fields}, "here")
    with pytest.raises(ConfigError, match=r"EDMEulerScheduler.* not Diffusion; set process=edm"):
        check_process(Diffusion(DiffusionConfig()), exported, "here")
