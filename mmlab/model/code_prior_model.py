"""A prior over the codes of a VQ first stage. Legend: B pictures, S side of pictures, h/w rows and columns of codes."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mmlab.config.errors import ConfigError
from mmlab.model.autoencoder import VQAutoencoder
from mmlab.model.code_gpt import CodeGPT
from mmlab.model.conditioner import Condition, Conditioner
from mmlab.model.first_stage import to_signed


class CodePriorModel(nn.Module):
    """Pictures as codes, and a transformer that writes them (Taming Transformers, section 3.2).

    Args:
        first_stage: between pictures and codes.
        conditioner: embeds classes, texts or the codes of maps.
        prior: builds the transformer from `codes`, `vector_width`, `context_width` and `context_length`.
        map_stage: between maps and their codes, for a conditioner that reads maps.

    Raises:
        ConfigError: a first stage without codes, or a map stage that is missing, idle, or of another factor or book.
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
                f"model.first_stage={type(first_stage).__name__} has no codes to learn; choose one with a codebook,"
                " such as model/first_stage=vq_tiny."
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
        """Logits `[B, N, K]`, see `CodeGPT`."""
        return self.prior(codes_BN, condition)

    @torch.no_grad()
    def codes(self, pixels_B3SS: Tensor, maps: bool = False) -> Tensor:
        """The codes of uint8 pictures, or with `maps` of uint8 maps: int64 `[B, h, w]`."""
        stage = self.map_stage if maps else self.first_stage
        assert stage is not None
        pixels = to_signed(pixels_B3SS)
        # In full precision, as caches of codes are made.
        with torch.autocast(pixels.device.type, enabled=False):
            return stage.codes(pixels)

    def condition(self, batch: Mapping[str, Tensor], drop_B: Tensor | None = None) -> Condition:
        """What a batch tells; of maps it may have `map_codes`, or `map_pixels` to encode.

        Args:
            batch: fields that the conditioner reads.
            drop_B: bool `[B]`, rows that get the null condition.
        """
        given = dict(batch)
        if self.conditioner.reads == "map" and "map_codes" not in given:
            given["map_codes"] = self.codes(given["map_pixels"], maps=True)
        return self.conditioner(given, drop_B)


def _map_stage(found: nn.Module | None, first_stage: VQAutoencoder, conditioner: Conditioner) -> VQAutoencoder | None:
    if conditioner.reads != "map":
        if found is not None:
            raise ConfigError("model.map_stage encodes maps, and model.conditioner reads none; take conditioner=map.")
        return None
    if not isinstance(found, VQAutoencoder):
        raise ConfigError(
            "model.conditioner reads maps, so model.map_stage must be a first stage with a codebook, such as"
            " model/first_stage@model.map_stage=vq_tiny, with model.map_stage.source=<run>/artifacts/first_stage."
        )
    if found.factor != first_stage.factor:
        raise ConfigError(
            f"model.map_stage takes {found.factor} pixels to a code and model.first_stage {first_stage.factor}: maps"
            " and pictures need codes at the same places."
        )
    codes = getattr(conditioner, "codes", found.quantizer.codes)
    if codes != found.quantizer.codes:
        raise ConfigError(
            f"model.conditioner.codes={codes}, but model.map_stage has {found.quantizer.codes}; leave it to the config:"
            " model/conditioner=map."
        )
    return found
