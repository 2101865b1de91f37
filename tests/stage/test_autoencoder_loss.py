"""Each term of the loss against its formula, and the guards around it."""

import copy

import pytest
import torch
from torch import nn

from mmlab.config.errors import ConfigError, RunError
from mmlab.model.config import PatchDiscriminatorConfig
from mmlab.model.discriminator import PatchDiscriminator
from mmlab.model.first_stage import Posterior, Reconstruction
from mmlab.model.quantizer import Quantized
from mmlab.stage.autoencoder_loss import (
    Terms,
    adaptive_weight,
    autoencoder_loss,
    generator_loss,
    hinge_loss,
    refuse_blow_up,
    refuse_code_collapse,
)
from mmlab.stage.config import AutoencoderTrainingConfig
from tests.model import tiny_autoencoders as tiny

B, VALUES, LATENTS = 2, 3 * 16 * 16, 3 * 4 * 4
X, Y = tiny.pictures(), tiny.pictures(seed=1)
PERCEPTUAL = torch.tensor([0.3, 0.5])
POSTERIOR = Posterior(torch.randn(B, 3, 4, 4), torch.randn(B, 3, 4, 4))
CODES = Quantized(POSTERIOR.mean, torch.zeros(B, 4, 4, dtype=torch.int64), torch.tensor([7.0, 9.0]), codes=16)


def terms_of(
    reduction: str,
    pixel: str,
    perceptual: float,
    kl: float = 0.0,
    codebook: float = 1.0,
    made: Reconstruction | None = None,
    posterior: Posterior = POSTERIOR,
) -> Terms:
    weights = {"perceptual_weight": perceptual, "kl_weight": kl, "codebook_weight": codebook}
    config = AutoencoderTrainingConfig(reduction=reduction, pixel=pixel, **weights)
    return autoencoder_loss(config, X, made or Reconstruction(Y), posterior, PERCEPTUAL)


def test_sums_are_latent_diffusion_s():
    terms = terms_of("sum", "l1", 0.7, 1e-3)
    everywhere = (X - Y).abs() + 0.7 * PERCEPTUAL.view(B, 1, 1, 1)
    torch.testing.assert_close(terms.reconstruction, everywhere.sum() / B)
    torch.testing.assert_close(terms.penalty, 1e-3 * POSTERIOR.kl().sum() / B)


def test_means_are_vqgan_s():
    point = Posterior(POSTERIOR.mean)
    terms = terms_of("mean", "l1", 0.7, codebook=0.9, made=Reconstruction(Y, CODES), posterior=point)
    torch.testing.assert_close(terms.reconstruction, (X - Y).abs().mean() + 0.7 * PERCEPTUAL.mean())
    torch.testing.assert_close(terms.penalty, torch.tensor(0.9 * 16.0 / (B * LATENTS)))
    assert terms.logged.keys() == {"pixel", "perceptual", "codebook"}


@pytest.mark.parametrize("pixel", ["l1", "l2"])
def test_a_weight_belongs_to_its_reduction(pixel):
    """As the settings say: w of `sum` is w · latent values / pixel values of `mean`."""
    summed = terms_of("sum", pixel, 0.7, 1e-3)
    mean = terms_of("mean", pixel, 0.7, 1e-3 * LATENTS / VALUES)
    torch.testing.assert_close(summed.reconstruction, mean.reconstruction * VALUES)
    torch.testing.assert_close(summed.penalty, mean.penalty * VALUES)


def test_what_is_logged_depends_on_no_reduction_or_weight():
    a, b = terms_of("sum", "l2", 5.0, 5.0).logged, terms_of("mean", "l2", 0.0, 0.0).logged
    wanted = {
        "pixel": (X - Y).square().mean(),
        "perceptual": PERCEPTUAL.mean(),
        "kl": POSTERIOR.kl().mean() / LATENTS,
    }
    for logged in (a, b):
        torch.testing.assert_close(logged, wanted)


@pytest.mark.parametrize(("options", "says"), [({"reduction": "some"}, "Did you mean 'sum'"), ({"pixel": "l3"}, "l1")])
def test_unknown_choices_are_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        AutoencoderTrainingConfig(**options)


def test_the_hinge_loss():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.5])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1.5) / 2))
    assert hinge_loss(torch.zeros(3), torch.zeros(3)) == 1


def test_the_generator_s_term_reaches_pictures_and_nothing_of_the_discriminator():
    torch.manual_seed(0)
    judge = PatchDiscriminator(PatchDiscriminatorConfig(layers=2, width=8)).train()
    state = copy.deepcopy(judge.state_dict())
    fake = Y.clone().requires_grad_()
    loss = generator_loss(judge, fake)
    torch.testing.assert_close(loss, -copy.deepcopy(judge)(Y).mean())
    loss.backward()
    assert fake.grad is not None and fake.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in judge.parameters())
    assert all(torch.equal(value, state[name]) for name, value in judge.state_dict().items()), "norms, too"


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    layer = nn.Parameter(torch.tensor([3.0, 4.0]))
    reconstruction, generator = 10 * layer.sum(), (2 * layer).square().sum()
    expected = torch.full((2,), 10.0).norm() / ((8 * layer).norm() + 1e-4)
    weight = adaptive_weight(reconstruction, generator, layer)
    torch.testing.assert_close(weight, expected.detach())
    assert not weight.requires_grad and layer.grad is None
    assert adaptive_weight(1e9 * layer.sum(), generator, layer) == 1e4
    (reconstruction + generator).backward()  # both graphs are still there


HEALTHY = {"loss": 3.0, "kl": 20.0, "logits_real": 0.3, "logits_fake": -2.0}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kl": 2e4}, "20,000|2e\\+04 nats per latent value"),
        ({"logits_fake": -1e6}, "the discriminator's mean logits_fake is -1e\\+06"),
        ({"logits_real": 1e6}, "the discriminator's mean logits_real"),
    ],
)
def test_a_run_that_has_blown_up_stops(change, says):
    refuse_blow_up(HEALTHY, 7)
    with pytest.raises(RunError, match=says):
        refuse_blow_up({**HEALTHY, **change}, 7)


def test_a_codebook_may_not_collapse_for_good():
    refuse_code_collapse(1.0, codes=8192, vectors=10**6, step=999)
    refuse_code_collapse(100.0, codes=8192, vectors=10**6, step=5000)
    refuse_code_collapse(3.0, codes=8192, vectors=64, step=5000)
    for perplexity, codes in ((80.0, 8192), (1.9, 16)):
        with pytest.raises(RunError, match="the codebook has collapsed"):
            refuse_code_collapse(perplexity, codes, vectors=10**6, step=5000)
