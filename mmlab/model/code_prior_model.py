"""A prior over the codes of a VQ first stage. Legend: B images, S their side, h/w rows and columns of codes."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mmlab.config.errors import ConfigError
from mmlab.model.autoencoder import VQAutoencoder
from mmlab.model.code_gpt import CodeGPT
from mmlab.model.conditioner import Condition, Conditioner
from mmlab.model.first_stage import to_signed


class CodePriorModel(nn.Module):
    """A first stage with codes, and a transformer that generates them (Taming Transformers, section 3.2).

    Args:
        first_stage: between images and codes.
        conditioner: embeds classes, texts or the codes of maps.
        prior: builds the transformer from `codes`, `vector_width`, `context_width` and `context_length`.
        map_stage: between maps and their codes, for a conditioner that reads maps.

    Raises:
        ConfigError: a first stage without codes, or a map stage that is missing, unused, or of another factor or number
            of codes.
    """

    def __init__(
        self,
        first_stage: nn.Module,
        conditioner: Conditioner,
        prior: Callable[..., CodeGPT],
        map_stage: nn.Module | None = None,
    ):
        super().__init__()
        if not isinstance(first_stage, VQAutoencoder):
            raise ConfigError(
                f"model.first_stage={type(first_stage).__name__} has no codes; choose one with a codebook, such as"
                " model/first_stage=vq_tiny."
            )
        self.first_stage: VQAutoencoder = first_stage
        self.map_stage: VQAutoencoder | None = _map_stage(map_stage, first_stage, conditioner)
        self.conditioner = conditioner
        self.prior = prior(
            codes=first_stage.quantizer.codes,
            vector_width=conditioner.vector_width,
            context_width=conditioner.context_width,
            context_length=conditioner.context_length,
        )

    def forward(self, codes_BN: Tensor, condition: Condition) -> Tensor:
        """Return logits `[B, N, K]`, see `CodeGPT`."""
        return self.prior(codes_BN, condition)

    @torch.no_grad()
    def codes(self, pixels_B3SS: Tensor, maps: bool = False) -> Tensor:
        """Return the codes of uint8 images, or with `maps` of uint8 maps: int64 `[B, h, w]`."""
        stage = self.map_stage if maps else self.first_stage
        assert stage is not None
        pixels = to_signed(pixels_B3SS)
        # In full precision, as for caches of codes.
        with torch.autocast(pixels.device.type, enabled=False):
            return stage.codes(pixels)

    def condition(self, batch: Mapping[str, Tensor], drop_B: Tensor | None = None) -> Condition:
        """Return the condition of a batch.

        Args:
            batch: fields that the conditioner reads; for maps `map_codes`, or `map_pixels` to encode.
            drop_B: bool `[B]`, rows that get the null condition.
        """
        fields = dict(batch)
        if self.conditioner.reads == "map" and "map_codes" not in fields:
            fields["map_codes"] = self.codes(fields["map_pixels"], maps=True)
        return self.conditioner(fields, drop_B)


def _map_stage(stage: nn.Module | None, first_stage: VQAutoencoder, conditioner: Conditioner) -> VQAutoencoder | None:
    if conditioner.reads != "map":
        if stage is not None:
            raise ConfigError("model.map_stage is set, but model.conditioner reads no maps; set model/conditioner=map.")
        return None
    if not isinstance(stage, VQAutoencoder):
        raise ConfigError(
            "model.conditioner reads maps, so model.map_stage must be a first stage with a codebook, such as"
            " model/first_stage@model.map_stage=vq_tiny, with model.map_stage.source=<run>/artifacts/first_stage."
        )
    if stage.factor != first_stage.factor:
        raise ConfigError(
            f"model.map_stage has {stage.factor} pixels per code and model.first_stage {first_stage.factor}: maps and"
            " images need codes at the same positions."
        )
    codes = getattr(conditioner, "codes", stage.quantizer.codes)
    if codes != stage.quantizer.codes:
        raise ConfigError(
            f"model.conditioner.codes={codes}, but model.map_stage has {stage.quantizer.codes} codes; do not set it:"
            " model/conditioner=map does."
        )
    return stage
