"""Autoencoders as first stages. Legend: B images, H/W pixels, C/h/w channels and sides of latents."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmlab.config.errors import ConfigError
from mmlab.model.config import KLAutoencoderConfig, VQAutoencoderConfig
from mmlab.model.diffusers_vae import (
    NOT_ARCHITECTURE,
    build_kl,
    read_kl,
    sizes_that_fit,
    stated_statistics,
    with_blocks,
)
from mmlab.model.diffusers_vq import DEFAULTS, buffers_of, read_vq, vq_place
from mmlab.model.discriminator import PatchDiscriminator
from mmlab.model.first_stage import Autoencoder, Posterior, Reconstruction, for_encoding
from mmlab.model.pretrained import on_meta, require_source
from mmlab.model.quantizer import Quantizer
from mmlab.runs.disk import to_json
from mmlab.weights import fill

LOGVAR = (-30.0, 20.0)
"""Bounds of the posterior's log-variance, as in LDM and diffusers: exp of more overflows."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class KLAutoencoder(Autoencoder):
    """diffusers' `AutoencoderKL`: a Gaussian posterior with a small KL penalty (LDM, section 3.1).

    Its artifact is a diffusers folder with the latents' statistics as `latents_mean` and `latents_std` (and
    `scaling_factor` 1). In other folders, `scaling_factor` and `shift_factor` are the statistics; a `scaling_factor` of
    1 alone means that the latents were not measured.

    Args:
        config: settings.

    Raises:
        ConfigError: unknown fields, sizes that do not fit together, or a source that cannot be read.
    """

    def __init__(self, config: KLAutoencoderConfig):
        vae = build_kl(config)
        super().__init__(vae.config["latent_channels"], factor=2 ** (len(vae.config["block_out_channels"]) - 1))
        self.settings = config
        self.vae = vae
        self._take_statistics()

    def encode(self, x_B3HW: Tensor) -> Posterior:
        hidden = self.vae.encoder(for_encoding(x_B3HW.to(self.vae.dtype)))
        if self.vae.quant_conv is not None:
            hidden = self.vae.quant_conv(hidden)
        mean, logvar = hidden.float().contiguous().chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR))

    def decode(self, z_BChw: Tensor) -> Tensor:
        hidden = z_BChw.to(self.vae.dtype)
        if self.vae.post_quant_conv is not None:
            hidden = self.vae.post_quant_conv(hidden)
        return self.vae.decoder(hidden).float()

    def reconstruct(self, z_BChw: Tensor) -> Reconstruction:
        return Reconstruction(self.decode(z_BChw))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.vae.decoder.get_parameter("conv_out.weight")

    def save(self, folder: Path) -> None:
        """Write a diffusers AutoencoderKL folder, statistics included."""
        if self.measured and not self._states_statistics():
            self.vae.register_to_config(
                latents_mean=self.latent_mean.tolist(),
                latents_std=self.latent_std.tolist(),
                scaling_factor=1.0,
                shift_factor=None,
            )
        self.vae.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Fill weights and statistics from an AutoencoderKL folder; raises ConfigError when it does not fit."""
        self._fill(str(folder))

    def load_pretrained(self) -> None:
        """Fill weights and statistics from the source of the settings; raises ConfigError when it does not fit."""
        if self.settings.init == "pretrained":
            self._fill(require_source(self.settings, "first_stage"))

    def _fill(self, source: str) -> None:
        with torch.device("cpu"):
            stored = read_kl(source)
        names = [name for name in self.vae.config if not name.startswith("_") and name not in NOT_ARCHITECTURE]
        _compare({n: stored.config.get(n) for n in names}, {n: self.vae.config[n] for n in names}, source)
        fill(self.vae, stored.state_dict(), source)
        self.vae.register_to_config(**{name: stored.config.get(name) for name in NOT_ARCHITECTURE})
        self._take_statistics()

    def _states_statistics(self) -> bool:
        """Whether the diffusers config has the current statistics."""
        stated = stated_statistics(self.vae.config, self.channels)
        now = torch.stack([self.latent_mean, self.latent_std]).cpu()
        return stated is not None and torch.equal(torch.stack(stated), now)

    def _take_statistics(self) -> None:
        if on_meta():
            return
        stated = stated_statistics(self.vae.config, self.channels)
        if stated is None:
            self.forget_statistics()
        else:
            self.set_statistics(*stated)


class VQAutoencoder(Autoencoder):
    """An encoder and a decoder around a codebook (VQGAN, section 3.1; LDM's "VQ-reg.").

    `encode` gives the latents before they are quantized and `decode` quantizes them, so that a denoiser works on
    continuous latents and its small errors vanish (LDM, section 3.1). 1x1 convolutions lie between the encoder's
    channels and the codes' width, which may differ.

    Args:
        config: settings. Of the architecture, `latent_channels` is the encoder's output, by default the codes' width.
        quantizer: the codebook; C is its width.

    Attributes:
        untrained: whether its weights are random, and its codes meaningless.

    Raises:
        ConfigError: unknown fields, or sizes that do not fit together.
    """

    forward_methods = ("encode", "decode", "reconstruct", "codes", "decode_codes")

    FIELDS = (
        "block_out_channels", "layers_per_block", "norm_num_groups", "act_fn", "mid_block_add_attention",
        "latent_channels", "down_block_types", "up_block_types",
    )  # fmt: skip

    def __init__(self, config: VQAutoencoderConfig, quantizer: Quantizer):
        fields = with_blocks(config.architecture, self.FIELDS)
        super().__init__(quantizer.width, factor=2 ** (len(fields["block_out_channels"]) - 1))
        self.settings = config
        self.architecture = dict(fields)
        hidden = fields.pop("latent_channels", quantizer.width)
        down, up = fields.pop("down_block_types"), fields.pop("up_block_types")
        from diffusers.models.autoencoders.vae import Decoder, Encoder

        with sizes_that_fit():
            self.encoder = Encoder(3, hidden, down_block_types=down, double_z=False, **fields)
            self.decoder = Decoder(hidden, 3, up_block_types=up, **fields)
        self.quant_conv = nn.Conv2d(hidden, quantizer.width, 1)
        self.quantizer = quantizer
        self.post_quant_conv = nn.Conv2d(quantizer.width, hidden, 1)
        self.untrained = config.source is None

    def encode(self, x_B3HW: Tensor) -> Posterior:
        hidden = self.quant_conv(self.encoder(for_encoding(x_B3HW.to(self.last_layer.dtype))))
        return Posterior(self.quantizer.project(hidden.contiguous()))

    def decode(self, z_BChw: Tensor) -> Tensor:
        return self.reconstruct(z_BChw).pixels

    def reconstruct(self, z_BChw: Tensor) -> Reconstruction:
        codes = self.quantizer(z_BChw)
        return Reconstruction(self._pixels(codes.values), codes)

    def codes(self, x_B3HW: Tensor) -> Tensor:
        """Encode pixels in [-1, 1] as codes, int64 `[B, h, w]`."""
        return self.quantizer.indices(self.encode(x_B3HW).mean)

    def decode_codes(self, indices_Bhw: Tensor) -> Tensor:
        """Decode codes, int64 `[B, h, w]`, to float32 pixels `[B, 3, H, W]` in about [-1, 1]."""
        return self._pixels(self.quantizer.vectors(indices_Bhw))

    def _pixels(self, vectors_BChw: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(vectors_BChw.to(self.last_layer.dtype))).float()

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.get_parameter("conv_out.weight")

    def after_step(self, step: int) -> None:
        self.quantizer.after_step(step)

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`, statistics and codebook included."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(to_json(self._config(), indent=2) + "\n")
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / WEIGHTS)

    def load_pretrained(self) -> None:
        """Fill the autoencoder from the source of the settings, if any; raises ConfigError when it does not fit."""
        source = self.settings.source
        if source is None:
            return
        place = vq_place(source)
        if "_class_name" not in place.config():  # of `save`
            self.load(Path(place.folder()))
            return
        if getattr(self.quantizer.config, "ema", None) is not None:
            raise ConfigError(f"{source} has no moving averages; set model/first_stage/quantizer=nearest.")
        stored = read_vq(source)
        here = {**DEFAULTS, "latent_channels": self.quantizer.width, **self._config()}
        _compare(stored.config, here, source)
        fill(self, {**stored.weights, **buffers_of(self, stored.weights)}, source)
        self.untrained = False
        if stored.statistics is not None:
            self.set_statistics(*stored.statistics)

    def load(self, folder: Path) -> None:
        """Fill the autoencoder from a folder of `save`; raises ConfigError when it does not fit."""
        try:
            config = json.loads((folder / CONFIG).read_text())
            weights = load_file(folder / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(f"{folder} is not a VQ autoencoder: {error}.") from error
        _compare(config, self._config(), folder)
        fill(self, weights, folder)
        self.untrained = False

    def _config(self) -> dict[str, Any]:
        return {**self.architecture, **self.quantizer.describe()}


def _compare(stored: Mapping[str, Any], here: Mapping[str, Any], source: str | Path) -> None:
    """Refuse another architecture by the name of its field: equal shapes can hide it."""
    for name in sorted(stored.keys() | here.keys()):
        theirs, ours = (_listed(config.get(name)) for config in (stored, here))
        if theirs != ours:
            raise ConfigError(f"{source} does not fit the model: it has {name}={theirs}, not {ours}.")


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class AutoencoderModel(nn.Module):
    """Autoencoder with discriminator and perceptual distance; later runs use only the first stage.

    Args:
        first_stage: encodes and decodes.
        discriminator: learns to tell its reconstructions from images; None if the loss has none.
        perceptual: a distance of images, `(x, y)` in [-1, 1] → `[B]`, with its `label` and the side of the `smallest`
            image that it takes; never trained.

    Raises:
        ConfigError: a first stage without weights.
    """

    def __init__(self, first_stage: nn.Module, discriminator: PatchDiscriminator | None, perceptual: nn.Module):
        super().__init__()
        if not isinstance(first_stage, Autoencoder):
            raise ConfigError(
                f"model.first_stage={type(first_stage).__name__} has no weights to train; choose an autoencoder, such "
                "as model/first_stage=kl_tiny."
            )
        self.first_stage: Autoencoder = first_stage
        self.discriminator: Any = discriminator
        self.perceptual = perceptual
