"""Pixels as an encoder reads them."""

import pytest
import torch

from mmlab.model import preprocessing
from mmlab.model.preprocessing import normalized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pictures", "cached"), [(5, 2 * 3 * 8 * 7), (5, 1), (1, 2**18), (0, 1)])
def test_pixels_are_normalized_in_parts(pictures, cached, dtype, monkeypatch):
    monkeypatch.setattr(preprocessing, "CACHED", cached)
    pixels = torch.randint(0, 256, (pictures, 3, 8, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([[90.3], [100.1], [110.7]])[..., None], torch.tensor([[50.9], [60.1], [70.3]])[..., None]
    for given in (pixels, pixels.flip(-1), pixels / 3):
        values = normalized(given, mean, std, dtype)
        assert values.dtype == dtype and torch.equal(values, ((given - mean) / std).to(dtype))
