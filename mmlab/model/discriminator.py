"""The discriminator of adversarial autoencoders. Legend: B pictures, H/W pixels, h/w patches."""

from typing import Any

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches, not whole pictures (pix2pix, sections 3.2.2 and 6.1.2; VQGAN and LDM use it).

    Convolutions of 4x4 with leaky ReLUs and batch norms: `layers` of them halve the sides, two more do not. Three
    layers see patches of 70x70 pixels and have 2.77M weights at width 64.

    Args:
        layers: convolutions that halve the sides.
        width: channels of the first one; they double with each, up to eight times.
    """

    def __init__(self, layers: int = 3, width: int = 64):
        super().__init__()
        self.smallest = 3 * 2**layers
        """Side in pixels of the smallest picture that it can judge."""
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for n in range(1, layers + 1):
            wider, stride = width * min(2**n, 8), 2 if n < layers else 1
            # A batch norm follows: a bias would do nothing.
            blocks += [nn.Conv2d(channels, wider, 4, stride, padding=1, bias=False), nn.BatchNorm2d(wider)]
            blocks.append(nn.LeakyReLU(0.2))
            channels = wider
        blocks.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.blocks = nn.Sequential(*blocks)
        self.apply(_initialise)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] → logits `[B, 1, h, w]`, high where a patch looks real."""
        # No get_parameter: while the discriminator judges as a fixed one, its weights are plain tensors.
        first: Any = self.blocks[0]
        return self.blocks(x_B3HW.to(first.weight.dtype))


def _initialise(module: nn.Module) -> None:
    """pix2pix's start: normal numbers of deviation 0.02."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
