"""A codebook of which one code is left: the run is told so, with what to do; and reviving the dead ones does it."""

import pytest
import torch

from mmlab.config.errors import RunError
from mmlab.stage.autoencoder import AutoencoderTraining
from tests.stage.tiny_adversarial import data_of, stage, train
from tests.tiny_shapes import make_shapes

STEPS = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), train=12, val=5)


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """The guard looks from the second validation on."""
    monkeypatch.setattr("mmlab.stage.autoencoder_loss.SETTLED_STEPS", STEPS)


def collapsed(**codebook) -> AutoencoderTraining:
    """All codes but one lie where no latent will come."""
    module = stage("vq", codebook={"codes": 32, "normalize": False, **codebook}, adversarial_weight=0.0)
    book: torch.Tensor = module.model.first_stage.quantizer.codebook
    with torch.no_grad():
        book[1:] += 1000
    return module


def test_a_collapse_is_reported_with_its_remedy(root, tmp_path):
    module = collapsed()
    with pytest.raises(RunError, match=r"has collapsed: its 32 codes have a perplexity of 1\.0 .*revive_after=100"):
        train(module, data_of(module, root), tmp_path, STEPS)


@pytest.mark.parametrize("codebook", [{}, {"ema": 0.5}])
def test_the_remedy_restores_use(root, tmp_path, codebook):
    module = collapsed(revive_after=2, **codebook)
    metrics = train(module, data_of(module, root), tmp_path, STEPS)
    assert metrics["val/perplexity"] > 4 and metrics["val/code_use"] > 0.25
    assert module.model.first_stage.quantizer.codebook.abs().max() < 100
