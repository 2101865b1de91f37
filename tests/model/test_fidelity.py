import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from mmlab.model.fidelity import psnr, ssim
from tests.model import tiny_autoencoders as tiny


def pair(size: int = 32):
    x = torch.nn.functional.avg_pool2d(tiny.pictures(3, size + 2), 3, stride=1)
    return x, (x + 0.1 * tiny.pictures(3, size, seed=1)).clamp(-1, 1)


def test_psnr_is_that_of_torchmetrics_picture_by_picture():
    x, y = pair()
    wanted = [peak_signal_noise_ratio(b, a, data_range=2.0) for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(psnr(x, y), torch.stack(wanted))
    assert psnr(x, x).isinf().all()
    assert psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.2)) == pytest.approx(20.0)


def test_ssim_is_that_of_torchmetrics_picture_by_picture():
    x, y = pair()
    _, every_place = structural_similarity_index_measure(y, x, data_range=2.0, return_full_image=True)
    # It pads the picture; the paper's window stays within.
    torch.testing.assert_close(ssim(x, y), every_place[..., 5:-5, 5:-5].mean((1, 2, 3)))
    torch.testing.assert_close(ssim(x, x), torch.ones(3))
    assert (ssim(x, y) < 0.99).all()


def test_small_pictures_have_a_smaller_window():
    x, y = pair(8)
    assert ssim(x, y).shape == (3,) and (ssim(x, x) > 0.9999).all() and (ssim(x, y) < 1).all()
