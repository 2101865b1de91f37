import pytest
import torch
from torch.distributions import Normal, kl_divergence

from mmlab.config.errors import RunError
from mmlab.model.first_stage import Identity, Posterior, to_signed, to_uint8
from tests.model import tiny_autoencoders as tiny


def posterior() -> Posterior:
    numbers = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return Posterior(numbers[0], 2 * numbers[1])


def test_the_kl_is_that_of_torch_s_normal_distributions():
    q = posterior()
    assert q.logvar is not None
    each = kl_divergence(Normal(q.mean, (0.5 * q.logvar).exp()), Normal(0.0, 1.0))
    assert q.kl().shape == (3,) and q.kl().dtype == torch.float32
    torch.testing.assert_close(q.kl(), each.sum((1, 2, 3)))
    assert torch.equal(Posterior(q.mean).kl(), torch.zeros(3))


def test_a_sample_is_the_mean_and_noise_at_its_deviation():
    q = posterior()
    assert q.logvar is not None
    noise = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close((q.sample(noise) - q.mean) / noise, q.logvar.div(2).exp())
    assert torch.equal(Posterior(q.mean).sample(noise), q.mean)


def test_pixels_are_signed_and_back_exactly():
    every = torch.arange(256, dtype=torch.uint8)
    signed = to_signed(every)
    assert (signed.min(), signed.max()) == (-1, 1)
    assert torch.equal(to_uint8(signed), every)
    assert to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def test_the_identity_needs_no_statistics():
    stage, x = Identity(), tiny.pictures()
    assert (stage.channels, stage.factor, stage.measured) == (3, 1, True)
    assert torch.equal(stage.encode(x).mean, x) and stage.encode(x).logvar is None
    assert torch.equal(stage.decode(x), x) and torch.equal(stage.normalized(x), x)


def test_statistics_normalise_channels_and_are_saved_with_the_weights():
    stage, z = tiny.kl(), torch.randn(5, 3, 4, 4) * torch.tensor([1.0, 3, 0.1]).view(3, 1, 1) + 2
    assert not stage.measured and torch.equal(stage.normalized(z), z)
    std, mean = torch.std_mean(z, (0, 2, 3), correction=0)
    stage.set_statistics(mean, std)
    normalized = stage.normalized(z)
    torch.testing.assert_close(normalized.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalized.std((0, 2, 3), correction=0), torch.ones(3))
    torch.testing.assert_close(stage.raw(normalized), z)
    other = tiny.kl()
    other.load_state_dict(stage.state_dict())
    assert other.measured and torch.equal(other.normalized(z), normalized)
    other.forget_statistics()
    assert not other.measured and torch.equal(other.normalized(z), z)


def test_a_cast_to_half_precision_leaves_the_statistics():
    stage = tiny.kl()
    mean, std = torch.tensor([1.001, 2.002, 3.003]), torch.tensor([0.1001, 0.2002, 0.3003])
    stage.set_statistics(mean, std)
    torch.nn.ModuleDict({"first_stage": stage}).to(torch.bfloat16)
    assert stage.last_layer.dtype == torch.bfloat16
    assert torch.equal(stage.latent_mean, mean) and torch.equal(stage.latent_std, std)
    x = tiny.pictures()
    z = stage.encode(x).mean
    assert z.dtype == torch.float32 and stage.decode(z).dtype == torch.float32
    assert stage.to("meta").latent_mean.is_meta


@pytest.mark.parametrize("std", [0.0, float("nan"), float("inf")])
def test_a_dead_channel_is_refused(std):
    stage = tiny.kl()
    with pytest.raises(RunError, match="channel 1 of the latents"):
        stage.set_statistics(torch.zeros(3), torch.tensor([1.0, std, 1.0]))
    assert not stage.measured


def test_images_that_are_not_finite_are_refused():
    pixels = torch.zeros(2, 3, 4, 4)
    assert to_uint8(pixels).unique().tolist() == [128]
    pixels[1, 2, 3, 3] = torch.nan
    with pytest.raises(RunError, match="The model's images have NaN or infinity, so there is no result"):
        to_uint8(pixels)
