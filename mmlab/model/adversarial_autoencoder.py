"""An autoencoder with what judges it while it is trained."""

from torch import nn

from mmlab.config.errors import ConfigError
from mmlab.model.discriminator import PatchDiscriminator
from mmlab.model.first_stage import Autoencoder


class AutoencoderModel(nn.Module):
    """The parts of `AutoencoderTraining`; the first stage is what later runs take from it.

    Args:
        first_stage: learns to encode and decode.
        discriminator: learns to tell its reconstructions from pictures.
        perceptual: a distance of pictures, `(x, y)` in [-1, 1] → `[B]`, with its `label` and the side of the `smallest`
            picture that it takes; never learns.

    Raises:
        ConfigError: a first stage without anything to learn.
    """

    def __init__(self, first_stage: nn.Module, discriminator: PatchDiscriminator, perceptual: nn.Module):
        super().__init__()
        if not isinstance(first_stage, Autoencoder):
            raise ConfigError(
                f"model.first_stage={type(first_stage).__name__} has nothing to learn; choose an autoencoder, such as "
                "model/first_stage=kl_tiny."
            )
        self.first_stage: Autoencoder = first_stage
        self.discriminator = discriminator
        self.perceptual = perceptual
