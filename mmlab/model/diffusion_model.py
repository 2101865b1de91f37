"""A diffusion model: first stage, conditioner, denoiser. Legend: B pictures, C latent channels, h/w latent sides."""

from collections.abc import Callable

from torch import Tensor, nn

from mmlab.config.errors import ConfigError
from mmlab.model.conditioner import Condition, Conditioner
from mmlab.model.first_stage import FirstStage


class DiffusionModel(nn.Module):
    """A denoiser of a first stage's latents (latent diffusion, section 3.2); of pixels where that is `Identity`.

    Args:
        first_stage: between pixels and latents.
        conditioner: embeds classes or texts.
        denoiser: builds the denoiser from `channels`, `vector_width` and `context_width`.

    Raises:
        ConfigError: a conditioner of maps.
    """

    def __init__(self, first_stage: FirstStage, conditioner: Conditioner, denoiser: Callable[..., nn.Module]):
        super().__init__()
        if conditioner.reads == "map":
            raise ConfigError("model.conditioner reads the codes of maps, which model=code_prior has, not a denoiser.")
        self.first_stage = first_stage
        self.conditioner = conditioner
        self.denoiser = denoiser(
            channels=first_stage.channels,
            vector_width=conditioner.vector_width,
            context_width=conditioner.context_width,
        )

    def forward(self, x_BChw: Tensor, time_B: Tensor, condition: Condition) -> Tensor:
        """Predict the process's target `[B, C, h, w]` for noised, normalised latents.

        Args:
            x_BChw: x_t.
            time_B: as `NoiseProcess.model_time` gives it.
            condition: of the conditioner.
        """
        return self.denoiser(x_BChw, time_B, condition)
