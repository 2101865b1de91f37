"""Classifier-free guidance around a model."""

import pytest
import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.diffusion.config import GuidanceConfig
from mmlab.diffusion.guidance import Guidance
from mmlab.diffusion.samplers import ddim
from tests.diffusion.gaussian import diffusion

X = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
T = torch.tensor([900, 900, 900, 900])
LABELS, NULL = torch.tensor([1, 2, 3, 4]), torch.zeros(4, dtype=torch.long)


class Model:
    """Predicts something different for each condition, and records its calls."""

    def __init__(self, dtype=torch.float32):
        self.calls: list[Tensor] = []
        self.dtype = dtype

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.calls.append(condition)
        return (torch.sin(x * (1 + condition[:, None, None])) + 0.001 * t[:, None, None]).to(self.dtype)


def test_scale_1_is_the_conditional_model_called_once():
    model = Model()
    assert torch.equal(Guidance(GuidanceConfig(1.0))(model, LABELS, NULL)(X, T), Model()(X, T, LABELS))
    assert [call.tolist() for call in model.calls] == [[1, 2, 3, 4]]


def test_scale_0_is_the_unconditional_model():
    model = Model()
    assert torch.equal(Guidance(GuidanceConfig(0.0))(model, LABELS, NULL)(X, T), Model()(X, T, NULL))
    assert [call.tolist() for call in model.calls] == [[0, 0, 0, 0]]


def test_the_null_condition_is_the_unconditional_model_at_any_scale():
    torch.testing.assert_close(Guidance(GuidanceConfig(7.5))(Model(), NULL, NULL)(X, T), Model()(X, T, NULL))


def test_guidance_extrapolates_from_null_through_conditional_in_one_call():
    model = Model()
    guided = Guidance(GuidanceConfig(3.0))(model, LABELS, NULL)(X, T)
    conditional, null = Model()(X, T, LABELS), Model()(X, T, NULL)
    torch.testing.assert_close(guided, null + 3 * (conditional - null))
    assert [call.tolist() for call in model.calls] == [[1, 2, 3, 4, 0, 0, 0, 0]]


def test_outside_the_interval_the_conditional_model_is_called_once():
    guidance = Guidance(GuidanceConfig(3.0, interval=[300, 800]))
    for time, guided in ((900, False), (801, False), (800, True), (500, True), (300, True), (299, False)):
        model, t = Model(), torch.full((4,), time)
        prediction = guidance(model, LABELS, NULL)(X, t)
        conditional, null = Model()(X, t, LABELS), Model()(X, t, NULL)
        expected = null + 3 * (conditional - null) if guided else conditional
        torch.testing.assert_close(prediction, expected)
        assert len(model.calls[0]) == (8 if guided else 4)


def test_each_sample_has_its_own_time():
    t = torch.tensor([900, 500, 100, 500])
    prediction = Guidance(GuidanceConfig(3.0, interval=[300, 800]))(Model(), LABELS, NULL)(X, t)
    conditional, null = Model()(X, t, LABELS), Model()(X, t, NULL)
    torch.testing.assert_close(prediction[[0, 2]], conditional[[0, 2]])
    torch.testing.assert_close(prediction[[1, 3]], (null + 3 * (conditional - null))[[1, 3]])
    zero = Guidance(GuidanceConfig(0.0, interval=[300, 800]))(Model(), LABELS, NULL)(X, t)
    torch.testing.assert_close(zero[[0, 2]], conditional[[0, 2]])
    torch.testing.assert_close(zero[[1, 3]], null[[1, 3]])


def test_rescale_restores_the_conditional_standard_deviation():
    conditional = Model()(X, T, LABELS).flatten(1)
    plain = Guidance(GuidanceConfig(5.0))(Model(), LABELS, NULL)(X, T).flatten(1)
    full = Guidance(GuidanceConfig(5.0, rescale=1.0))(Model(), LABELS, NULL)(X, T).flatten(1)
    part = Guidance(GuidanceConfig(5.0, rescale=0.7))(Model(), LABELS, NULL)(X, T).flatten(1)
    assert not torch.allclose(plain.std(1), conditional.std(1), rtol=0.1)
    torch.testing.assert_close(full.std(1), conditional.std(1))
    torch.testing.assert_close(part, 0.7 * full + 0.3 * plain)


def test_guidance_of_a_bfloat16_model_is_computed_in_float32():
    half = Model(torch.bfloat16)
    guided = Guidance(GuidanceConfig(3.0))(half, LABELS, NULL)(X, T)
    conditional, null = half(X, T, LABELS).float(), half(X, T, NULL).float()
    assert torch.equal(guided, null + 3 * (conditional - null))


def test_a_condition_may_be_nested():
    def model(x: Tensor, t: Tensor, condition: dict) -> Tensor:
        assert condition["mask"] is None
        return x * condition["label"][:, None, None] + condition["tokens"][1].mean(1)[:, None, None]

    def parts(label: Tensor, tokens: Tensor) -> dict:
        return {"label": label, "tokens": (label, tokens), "mask": None}

    condition, null = parts(LABELS, torch.ones(4, 5)), parts(NULL, torch.zeros(4, 5))
    guided = Guidance(GuidanceConfig(2.0))(model, condition, null)(X, T)
    torch.testing.assert_close(guided, 2 * model(X, T, condition) - model(X, T, null))


def test_a_guided_run_moves_samples_further():
    """One number per sample, whose data lie at ±1 by their label: guidance pushes beyond."""
    process = diffusion()

    def model(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        level = process.level(t)
        alpha, sigma = level.alpha[:, None].float(), level.sigma[:, None].float()
        return sigma * (x - alpha * label[:, None]) / ((0.3 * alpha) ** 2 + sigma**2)

    x, labels = torch.randn(64, 1, generator=torch.Generator().manual_seed(1)), torch.ones(64)
    means = []
    for guidance in (
        Guidance(GuidanceConfig(1.0)),
        Guidance(GuidanceConfig(2.0, interval=[200, 600])),
        Guidance(GuidanceConfig(2.0)),
    ):
        means.append(ddim(guidance(model, labels, 0 * labels), process, x, 50).mean().item())
    assert means[0] == pytest.approx(1.0, abs=0.05)
    assert means[0] + 0.2 < means[1] < means[2] - 0.2
    assert means[2] == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scale": -1.0}, "'scale' must be at least 0, not -1.0"),
        ({"interval": [800, 300]}, "interval=[800, 300] must be two times"),
        ({"interval": [500]}, "interval=[500] must be two times"),
        ({"rescale": 1.5}, "'rescale' must be at most 1, not 1.5"),
    ],
)
def test_a_wrong_setting_is_named(arguments, says):
    with pytest.raises(ConfigError) as error:
        Guidance(GuidanceConfig(**arguments))
    assert says in str(error.value)
