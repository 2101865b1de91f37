"""PSNR and SSIM of each pair of images. Legend: B images, H/W pixels; pixels are in [-1, 1].

torchmetrics agrees to float rounding (see the tests), but fixes its SSIM window at 11 pixels and pads the image by
reflection; a smaller image needs a smaller window, so that the whole computation would be needed here as well.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

PEAK = 2.0
"""Data range: the difference between white and black."""
WINDOW, SIGMA = 11, 1.5
"""Side and standard deviation of SSIM's Gaussian window, in pixels (Wang et al. 2004, section III.B)."""
K1, K2 = 0.01, 0.03


def psnr(x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each pair, in decibels: float32 `[B]`, infinite where they are equal.

    Pixels are not clamped; clamp a reconstruction to [-1, 1] first, as saving it to a file would.
    """
    error = (x_B3HW.float() - y_B3HW.float()).square().mean((1, 2, 3))
    return 10 * (PEAK**2 / error).log10()


def ssim(x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
    """Compute the structural similarity of each pair (Wang et al. 2004, equation 13): float32 `[B]`, at most 1.

    The mean over channels and over all positions at which the Gaussian window lies within the image. If a side of
    the image is shorter than the window, the window is cropped to the largest odd side that fits.
    """
    window = _window(min(WINDOW, *x_B3HW.shape[-2:]), x_B3HW.device)
    x, y = x_B3HW.float(), y_B3HW.float()
    with torch.autocast(x.device.type, enabled=False):
        mean_x, mean_y = _blur(x, window), _blur(y, window)
        var_x = _blur(x * x, window) - mean_x.square()
        var_y = _blur(y * y, window) - mean_y.square()
        covariance = _blur(x * y, window) - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean((1, 2, 3))


def _window(size: int, device: torch.device) -> Tensor:
    size -= 1 - size % 2
    at = torch.arange(size, dtype=torch.float32, device=device) - size // 2
    weights = torch.exp(-at.square() / (2 * SIGMA**2))
    return weights / weights.sum()


def _blur(x_B3HW: Tensor, window: Tensor) -> Tensor:
    channels = x_B3HW.shape[1]
    down = window.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    across = window.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    return F.conv2d(F.conv2d(x_B3HW, down, groups=channels), across, groups=channels)
