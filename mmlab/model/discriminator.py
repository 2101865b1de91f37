"""The discriminator of adversarial autoencoders. Legend: B images, H/W pixels, h/w patches."""

from torch import Tensor, nn

from mmlab.model.config import PatchDiscriminatorConfig


class PatchDiscriminator(nn.Module):
    """Classifies overlapping patches instead of whole images (pix2pix, sections 3.2.2 and 6.1.2; VQGAN and LDM use it).

    4x4 convolutions with leaky ReLUs and batch norms: `layers` of them halve the sides, two more do not. With three
    layers a patch is 70x70 pixels, with 2.77M weights at width 64.

    Args:
        config: settings.
    """

    def __init__(self, config: PatchDiscriminatorConfig):
        super().__init__()
        layers, width = config.layers, config.width
        self.smallest = 3 * 2**layers
        """Side in pixels of the smallest image that it takes."""
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for n in range(1, layers + 1):
            wider, stride = width * min(2**n, 8), 2 if n < layers else 1
            # A batch norm follows, which would cancel a bias.
            blocks += [nn.Conv2d(channels, wider, 4, stride, padding=1, bias=False), nn.BatchNorm2d(wider)]
            blocks.append(nn.LeakyReLU(0.2))
            channels = wider
        blocks.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.blocks = nn.Sequential(*blocks)
        self.apply(_initialize)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """Return logits `[B, 1, h, w]` for pixels in [-1, 1], high where a patch looks real."""
        return self.blocks(x_B3HW.to(self.blocks.get_parameter("0.weight").dtype))


def _initialize(module: nn.Module) -> None:
    """Initialize as pix2pix does: normal, standard deviation 0.02."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
