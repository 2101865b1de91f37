"""The best linear code of a set of pictures: what a first stage has to beat. Legend: N pictures, D values, K kept."""

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError


def refuse_too_few(values: int, pictures: int) -> None:
    """Raise ConfigError where `pictures` span fewer directions than a linear code of `values` numbers needs."""
    if not 0 < values < pictures:
        raise ConfigError(
            f"A linear code of {values} numbers takes more than {values} training pictures; there are {pictures}."
        )


class LinearCode:
    """Principal components of training pictures: of all linear codes with K numbers, the one of least square error.

    Args:
        train_N3HW: uint8 `[N, 3, H, W]`.
        values: K, numbers that a picture is coded by; as many as a first stage's latents have.

    Raises:
        ConfigError: K is not below the number of training pictures, which span no more directions.
    """

    def __init__(self, train_N3HW: Tensor, values: int):
        refuse_too_few(values, len(train_N3HW))
        flat = train_N3HW.flatten(1).float()
        self.mean = flat.mean(0)
        centred = flat - self.mean
        # The smaller of the two Gram matrices has the same components.
        if len(flat) <= flat.shape[1]:
            strength, vectors = torch.linalg.eigh(centred @ centred.T)
            axes = centred.T @ vectors[:, -values:] / strength[-values:].clamp(min=1e-6).sqrt()
        else:
            axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -values:]
        self.axes_DK, _ = torch.linalg.qr(axes)

    def __call__(self, pictures_N3HW: Tensor) -> Tensor:
        """Coded and decoded again: uint8 `[N, 3, H, W]`."""
        centred = pictures_N3HW.flatten(1).float() - self.mean
        decoded = centred @ self.axes_DK @ self.axes_DK.T + self.mean
        return decoded.round().clamp(0, 255).to(torch.uint8).view(pictures_N3HW.shape)
