"""Codes by Gumbel softmax: the likeliest when not training, as likely as they are else, with a gradient."""

import math

import pytest
import torch

from mmlab.model.config import GumbelQuantizerConfig, VQAutoencoderConfig
from mmlab.model.gumbel_quantizer import GumbelQuantizer
from tests.model import tiny_autoencoders as tiny


def quantizer(**options) -> GumbelQuantizer:
    torch.manual_seed(0)
    return GumbelQuantizer(GumbelQuantizerConfig(codes=6, width=4, **options))


def latents() -> torch.Tensor:
    return torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1))


def test_the_likeliest_code_when_not_training():
    book, z = quantizer().eval(), latents()
    out = book(z)
    logits = torch.einsum("bdhw,kd->bkhw", z, book.logits.weight[:, :, 0, 0]) + book.logits.bias[:, None, None]
    assert torch.equal(out.indices, logits.argmax(1)) and torch.equal(book.indices(z), out.indices)
    torch.testing.assert_close(out.values, book.vectors(out.indices))
    q = logits.softmax(1)
    kl = (q * (q * 6).log()).sum((1, 2, 3))
    torch.testing.assert_close(out.loss, 5e-4 * 4 * kl)


def test_codes_are_drawn_as_often_as_they_are_likely():
    book = quantizer().train()
    z = latents()[:1, :, :1, :1].expand(1, 4, 100, 100)
    drawn = book(z).indices.flatten().bincount(minlength=6) / 1e4
    expected = book._logits(z)[0, :, 0, 0].softmax(0)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0.02)


def test_the_gradient_goes_through_the_softmax():
    book, z = quantizer().train(), latents().requires_grad_()
    torch.manual_seed(2)
    out = book(z)
    chosen = book.vectors(out.indices)
    torch.testing.assert_close(out.values, chosen, rtol=1e-4, atol=1e-5)
    out.values.square().sum().backward()
    weights = (z, book.logits.weight, book.codebook)
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights)


def test_half_precision_does_not_round_the_codes():
    book = quantizer().eval()
    with torch.autocast("cpu", torch.bfloat16):
        out = book(latents())
    assert out.values.dtype == torch.float32
    torch.testing.assert_close(out.values, book.vectors(out.indices))


def test_the_temperature_falls_along_a_cosine_and_is_kept():
    book = quantizer(last_temperature=1 / 16, anneal_steps=100)
    found = []
    for step in (0, 50, 100, 400):  # the cosine itself would be back at its start
        book.after_step(step)
        found.append(book.temperature.item())
    assert found == pytest.approx([1, 17 / 32, 1 / 16, 1 / 16])
    again = quantizer(last_temperature=1 / 16, anneal_steps=100)
    again.load_state_dict(book.state_dict())
    assert again.temperature.item() == pytest.approx(1 / 16)
    still = quantizer(temperature=0.7)
    still.after_step(9)
    assert still.temperature.item() == pytest.approx(0.7) and math.isclose(still.config.kl_weight, 5e-4)


def test_an_autoencoder_around_it_saves_and_loads(tmp_path):
    from mmlab.config.errors import ConfigError
    from mmlab.model.autoencoder import VQAutoencoder

    model = VQAutoencoder(VQAutoencoderConfig(architecture=tiny.SIZES), quantizer()).eval()
    model.save(tmp_path)
    other = VQAutoencoder(
        VQAutoencoderConfig(architecture=tiny.SIZES), GumbelQuantizer(GumbelQuantizerConfig(codes=6, width=4))
    ).eval()
    other.load(tmp_path)
    x = tiny.pictures()
    assert torch.equal(other.codes(x), model.codes(x)) and not other.untrained
    torch.testing.assert_close(other.decode_codes(other.codes(x)), model.decode(model.encode(x).mean))
    with pytest.raises(ConfigError, match="it has quantizer=GumbelQuantizer, not None"):
        tiny.vq(codes=6, normalize=False).load(tmp_path)
