"""UNet denoisers around diffusers' networks. Legend: B images, C channels, H/W rows and columns, T tokens, D width.

Every denoiser is called with `(x_BCHW, time_B, condition)` and returns `[B, C, H, W]`; the condition is the dict that
`mmlab.model.conditioner` describes.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from mmlab.config.errors import ConfigError, nearest
from mmlab.model.alignment import Alignment
from mmlab.model.conditioner import Condition, Conditioner
from mmlab.model.config import UNetConfig
from mmlab.model.diffusers_source import reads_config
from mmlab.model.diffusers_unet import empty_unet, fill_unet
from mmlab.model.first_stage import FirstStage

DERIVED = ("in_channels", "out_channels", "cross_attention_dim", "class_embed_type", "num_class_embeds")
"""Fields of diffusers' UNets that follow from the first stage and the conditioner."""


class UNet(nn.Module):
    """diffusers' `UNet2DModel`, or `UNet2DConditionModel` where the condition has a context.

    A condition's vector is added to the time embedding, through a linear layer where their widths differ.

    Args:
        config: settings: `architecture` without the fields in `DERIVED`. Unless block types are given, all levels but
            the first have attention, as in latent diffusion. With a source, its architecture is that of the source.
        channels: C of the latents.
        vector_width: width of the condition's vector, None for a condition without one.
        context_width: width of the condition's context, likewise.

    Raises:
        ConfigError: a field that the class does not have, one of `DERIVED`, or fields that do not fit together; a
            source that cannot be read, or that is a UNet for other latents or conditions.
    """

    def __init__(
        self, config: UNetConfig, channels: int, vector_width: int | None = None, context_width: int | None = None
    ):
        super().__init__()
        self.settings = config
        if config.source is not None and reads_config(config):
            self.unet: Any = empty_unet(config.source, channels, vector_width, context_width)
        else:
            self.unet = _random_unet(config, channels, vector_width, context_width)
        self.channels, self.vector_width, self.context_width = channels, vector_width, context_width
        self.reduction = 2 ** (len(self.unet.config.block_out_channels) - 1)
        time_width = self.unet.time_embedding.linear_2.out_features
        self.vector = nn.Linear(vector_width, time_width) if vector_width not in (None, time_width) else nn.Identity()

    def forward(self, x_BCHW: Tensor, time_B: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Predict the process's target, `[B, C, H, W]` in the weights' dtype.

        Raises:
            ConfigError: latents whose sides cannot be halved as often as the UNet does.
        """
        height, width = x_BCHW.shape[-2:]
        if height % self.reduction or width % self.reduction:
            raise ConfigError(
                f"The UNet halves its input {self.reduction.bit_length() - 1} times: {height} x {width} must divide "
                f"by {self.reduction}; choose another data.size, or fewer block_out_channels."
            )
        options: dict[str, Any] = {}
        if self.vector_width is not None:
            options["class_labels"] = self.vector(condition["vector"])
        if self.context_width is not None:
            options["encoder_hidden_states"] = condition["context"].to(self.unet.dtype)
            options["encoder_attention_mask"] = condition.get("mask")
        return self.unet(x_BCHW.to(self.unet.dtype), time_B, **options).sample

    def aligned_layer(self, depth: int | None) -> tuple[nn.Module, int]:
        """The middle block, whose output is aligned with a vision encoder's features, and its channels.

        U-REPA (arXiv 2503.18414) finds the middle of a UNet to be the best place.

        Args:
            depth: of `AlignmentConfig`; None.

        Raises:
            ConfigError: a depth, or a UNet without a middle block.
        """
        if depth is not None:
            raise ConfigError(f"model.alignment.depth={depth}: a UNet is aligned at its middle block; leave it out.")
        if self.unet.mid_block is None:
            raise ConfigError("model.alignment takes the output of a UNet's middle block, and this UNet has none.")
        return self.unet.mid_block, self.unet.config.block_out_channels[-1]

    def load_pretrained(self) -> None:
        """Fill the UNet from the source of the settings, if any; raises ConfigError when it does not fit."""
        if self.settings.source is not None:
            fill_unet(self.unet, self.settings.source)


def _random_unet(config: UNetConfig, channels: int, vector_width: int | None, context_width: int | None) -> nn.Module:
    from diffusers.models.unets.unet_2d import UNet2DModel  # importing diffusers takes seconds
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    kind = UNet2DModel if context_width is None else UNet2DConditionModel
    fields: dict[str, Any] = {"in_channels": channels, "out_channels": channels}
    if context_width is not None:
        fields["cross_attention_dim"] = context_width
    if vector_width is not None:
        fields["class_embed_type"] = "identity"
    return _build(kind, _with_blocks(config.architecture, "Attn" if context_width is None else "CrossAttn"), fields)


def _with_blocks(architecture: dict[str, Any], attention: str) -> dict[str, Any]:
    """Return the fields, with block types for the levels of `block_out_channels`."""
    widths = architecture.get("block_out_channels", [])
    if not isinstance(widths, Sequence):
        raise ConfigError(f"model.denoiser.architecture.block_out_channels={widths} must be a list, a width per level.")
    deeper = len(widths) - 1
    if deeper < 0:
        return dict(architecture)
    down = ["DownBlock2D", *[f"{attention}DownBlock2D"] * deeper]
    up = [*[f"{attention}UpBlock2D"] * deeper, "UpBlock2D"]
    return {"down_block_types": down, "up_block_types": up, **architecture}


def _build(kind: type, architecture: dict[str, Any], derived: dict[str, Any]) -> nn.Module:
    """Build a diffusers class from its config fields; raises ConfigError with the name of a wrong one."""
    names = [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", *DERIVED)]
    for name in architecture:
        if name in DERIVED:
            raise ConfigError(
                f"model.denoiser.architecture.{name} follows from the first stage and the conditioner; leave it out."
            )
        if name not in names:
            hint = nearest(name, names)
            raise ConfigError(f"model.denoiser.architecture has no field '{name}' for {kind.__name__}.{hint}")
    try:
        return kind(**architecture, **derived)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"model.denoiser.architecture does not build a {kind.__name__}: {reason}.") from error


class DiffusionModel(nn.Module):
    """A denoiser of a first stage's latents (latent diffusion, section 3.2); of pixels if that is `Identity`.

    Args:
        first_stage: between pixels and latents.
        conditioner: embeds classes or texts.
        denoiser: builds the denoiser from `channels`, `vector_width` and `context_width`.
        vision: a frozen `ImageEncoder` for the alignment; None where there is none.
        alignment: builds the alignment from `denoiser` and `vision`; None: there is none.
        uncertainty: of the loss at each noise level, a `NoiseUncertainty`; None: there is none.

    Raises:
        ConfigError: a conditioner that reads maps; an encoder without an alignment, or one that `Alignment` refuses.
    """

    def __init__(
        self,
        first_stage: FirstStage,
        conditioner: Conditioner,
        denoiser: Callable[..., nn.Module],
        vision: nn.Module | None = None,
        alignment: Callable[..., Alignment] | None = None,
        uncertainty: nn.Module | None = None,
    ):
        super().__init__()
        if conditioner.reads == "map":
            raise ConfigError("model.conditioner=map is only for model=code_prior; a denoiser takes a class or a text.")
        self.first_stage = first_stage
        self.conditioner = conditioner
        self.denoiser = denoiser(
            channels=first_stage.channels,
            vector_width=conditioner.vector_width,
            context_width=conditioner.context_width,
        )
        if vision is not None and alignment is None:
            raise ConfigError("model.vision is of no use without an alignment; choose model/alignment=repa.")
        self.vision = vision
        self.alignment = None if alignment is None else alignment(denoiser=self.denoiser, vision=vision)
        self.uncertainty = uncertainty

    def forward(self, x_BChw: Tensor, time_B: Tensor, condition: Condition) -> Tensor:
        """Predict the process's target `[B, C, h, w]` for noised, normalized latents.

        Args:
            x_BChw: x_t.
            time_B: as `NoiseProcess.model_time` gives it.
            condition: of the conditioner.
        """
        return self.denoiser(x_BChw, time_B, condition)
