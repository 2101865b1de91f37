import pytest
import torch

from mmlab.config.errors import ConfigError
from mmlab.evaluate.pictures.reconstructions import LinearCode


def drawn(count: int, rank: int, seed: int, side: int = 4) -> torch.Tensor:
    """Pictures in a space of `rank` directions around grey; the directions are the same for every seed."""
    axes = torch.randn(rank, 3 * side * side, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(count, rank, generator=torch.Generator().manual_seed(seed)) * 12
    return (128 + weights @ axes).round().clamp(0, 255).to(torch.uint8).view(count, 3, side, side)


def error(code: LinearCode, pictures: torch.Tensor) -> float:
    return float((code(pictures).float() - pictures.float()).square().mean())


@pytest.mark.parametrize("count", [30, 200])  # fewer pictures than values, and more
def test_it_is_the_best_linear_code(count):
    train, held_out = drawn(count, 5, 1), drawn(20, 5, 2)
    assert error(LinearCode(train, 5), held_out) < 1.0, "five directions span the set: rounding remains"
    code = LinearCode(train, 3)
    flat = train.flatten(1).double()
    rest = torch.linalg.svdvals(flat - flat.mean(0))[3:].square().sum() / flat.numel()
    assert error(code, train) == pytest.approx(float(rest), rel=0.02), "what the three largest directions leave"
    assert torch.allclose(code.axes_DK.T @ code.axes_DK, torch.eye(3), atol=1e-5)
    assert code(held_out).dtype == torch.uint8 and code(held_out).shape == held_out.shape


def test_more_values_than_pictures_is_refused():
    with pytest.raises(ConfigError, match="more than 30 training pictures; there are 30"):
        LinearCode(drawn(30, 5, 1), 30)
