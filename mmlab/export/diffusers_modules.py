"""Our parts as diffusers' modules, converted weight by weight: diffusers computes the same with them.

Legend: C latent channels, D width of a vector, K classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mmlab.config.errors import ConfigError
from mmlab.model.autoencoder import KLAutoencoder, VQAutoencoder
from mmlab.model.conditioner import ClassCondition, Conditioner
from mmlab.model.denoiser import UNet
from mmlab.model.dit import Block, DiT
from mmlab.model.first_stage import FirstStage, Identity

DIT_NULL = 1000
"""The class that means no class to diffusers' DiTPipeline, whatever the number of classes."""


def autoencoder(first_stage: FirstStage) -> Any:
    """Convert a first stage to diffusers' `AutoencoderKL`, of normalized latents, or `VQModel`, of raw ones.

    Returns:
        None for pixel space.

    Raises:
        ConfigError: a user's own first stage.
    """
    if isinstance(first_stage, Identity):
        return None
    if isinstance(first_stage, KLAutoencoder):
        folded = folded_autoencoder(first_stage.vae, first_stage.latent_mean, first_stage.latent_std)
        if first_stage.measured:
            # No pipeline changes latents for it, and as a first stage of ours it is known to be measured.
            channels = first_stage.channels
            folded.register_to_config(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
        return folded
    if isinstance(first_stage, VQAutoencoder):
        return _vq_model(first_stage)
    raise ConfigError(f"diffusers has no class for {type(first_stage).__name__}.")


def _vq_model(first_stage: VQAutoencoder) -> Any:
    """Convert a VQ autoencoder.

    Normalized codes are exported as such: the nearest of them to a vector is the nearest to its direction.

    Raises:
        ConfigError: a quantizer that does not choose the nearest code.
    """
    from diffusers.models.autoencoders.vq_model import VQModel

    book = first_stage.quantizer
    if not book.nearest:
        raise ConfigError(f"diffusers' VQModel chooses the nearest code; it cannot represent a {type(book).__name__}.")
    exported = VQModel(
        **{"latent_channels": book.width, **first_stage.architecture},
        num_vq_embeddings=book.codes,
        vq_embed_dim=book.width,
        scaling_factor=1.0,
    )
    parts = ("encoder", "decoder", "quant_conv", "post_quant_conv")
    weights = {name: value for name, value in first_stage.state_dict().items() if name.split(".")[0] in parts}
    weights["quantize.embedding.weight"] = book.book().detach()
    exported.load_state_dict(weights)
    return exported.eval()


def folded_autoencoder(vae: Any, mean_C: Tensor, std_C: Tensor) -> Any:
    """Copy a diffusers AutoencoderKL such that its latents are normalized, and pipelines need not scale them.

    (z − mean) / std per channel is linear, as are the 1x1 convolutions after its encoder and before its decoder, so the
    statistics are folded into their weights, exactly.

    Args:
        vae: an AutoencoderKL; its scaling_factor is ignored.
        mean_C: of its raw latents, per channel.
        std_C: likewise.
    """
    unscaled = {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": None, "latents_std": None}
    folded = type(vae)(**{**fields(vae), **unscaled, "use_quant_conv": True, "use_post_quant_conv": True})
    weights, channels = dict(vae.state_dict()), len(mean_C)
    quant, bias = _convolution(vae.quant_conv, 2 * channels, weights["encoder.conv_in.weight"])
    post, post_bias = _convolution(vae.post_quant_conv, channels, weights["encoder.conv_in.weight"])
    mean, std = mean_C.to(bias), std_C.to(bias)
    ones = torch.ones_like(std)
    # The first C rows are the mean; the others log σ², which dividing by std shifts by −2·log std.
    weights["quant_conv.weight"] = quant / torch.cat([std, ones])[:, None, None, None]
    weights["quant_conv.bias"] = torch.cat([(bias[:channels] - mean) / std, bias[channels:] - 2 * std.log()])
    weights["post_quant_conv.weight"] = post * std[None, :, None, None]
    weights["post_quant_conv.bias"] = post_bias + post[:, :, 0, 0] @ mean
    folded.load_state_dict(weights)
    return folded.eval()


def fields(module: Any) -> dict[str, Any]:
    """Return the arguments that a diffusers module was built with."""
    return {name: value for name, value in module.config.items() if not name.startswith("_")}


def _convolution(layer: nn.Conv2d | None, channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a 1x1 convolution, or of the identity for None."""
    if layer is None:
        return torch.eye(channels).to(like)[:, :, None, None], torch.zeros(channels).to(like)
    assert layer.bias is not None
    return layer.weight.detach(), layer.bias.detach()


def unet(denoiser: UNet, conditioner: Conditioner, size: int) -> Any:
    """Copy the denoiser's diffusers UNet, with the class embedding inside.

    If a class is a vector, the UNet's class embedding is our table after the denoiser's linear layer. If it is the
    context, the UNet takes a one-hot row as `encoder_hidden_states`, and its projection is our table. The last row is
    no class.

    Args:
        denoiser: of the trained model.
        conditioner: of the trained model.
        size: side of the latents.
    """
    config, weights = {**fields(denoiser.unet), "sample_size": size}, dict(denoiser.unet.state_dict())
    if isinstance(conditioner, ClassCondition) and conditioner.as_context:
        table_KD = conditioner.embedding.weight.detach()
        config.update(encoder_hid_dim=len(table_KD), encoder_hid_dim_type="text_proj")
        weights["encoder_hid_proj.weight"] = table_KD.T.contiguous()
        weights["encoder_hid_proj.bias"] = torch.zeros_like(table_KD[0])
    elif (table_KD := vectors(denoiser.vector, conditioner)) is not None:
        config.update(class_embed_type=None, num_class_embeds=len(table_KD))
        weights["class_embedding.weight"] = table_KD
    exported = type(denoiser.unet)(**config)
    exported.load_state_dict(weights)
    return exported.eval()


def vectors(layer: nn.Module, conditioner: Conditioner) -> Tensor | None:
    """Return what a denoiser adds to its time embedding for each class, and in the last row for none: `[K + 1, D]`.

    Args:
        layer: of the denoiser, between the condition's vector and its time embedding.
        conditioner: of the trained model; if it gives no vector, None is returned.
    """
    if not isinstance(conditioner, ClassCondition) or conditioner.as_context:
        return None
    with torch.no_grad():
        return layer(conditioner.embedding.weight).detach()


def transformer(denoiser: DiT, conditioner: Conditioner, size: int) -> Any:
    """Convert a DiT to diffusers' `DiTTransformer2DModel`, with our embedding of time and class in every block.

    Its pipeline uses class 1000 for none, so the table has 1001 rows; all rows after our classes are no class.

    Args:
        denoiser: of the trained model.
        conditioner: of the trained model.
        size: side of the latents.

    Raises:
        ConfigError: another condition than classes, or more than 1000 of them.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    table = vectors(denoiser.vector, conditioner)
    if table is None or denoiser.context_width is not None or len(table) > DIT_NULL + 1:
        raise ConfigError("diffusers' DiTPipeline needs up to 1000 classes as its only condition.")
    missing = DIT_NULL + 1 - len(table)
    table = torch.cat([table, table[-1:].expand(missing, -1)])
    exported = DiTTransformer2DModel(
        num_attention_heads=denoiser.heads,
        attention_head_dim=denoiser.width // denoiser.heads,
        in_channels=denoiser.channels,
        out_channels=denoiser.channels,  # DiTPipeline reads it
        num_layers=len(denoiser.blocks),
        patch_size=denoiser.patch,
        sample_size=size,
        num_embeds_ada_norm=DIT_NULL,
        norm_eps=1e-6,
    )
    weights = named(denoiser.final.modulation, "proj_out_1") | named(denoiser.final.linear, "proj_out_2")
    patches = denoiser.embed.weight.unflatten(1, (denoiser.patch, denoiser.patch, denoiser.channels))
    weights["pos_embed.proj.weight"] = patches.permute(0, 3, 1, 2)
    weights["pos_embed.proj.bias"] = denoiser.embed.bias
    for i, block in enumerate(denoiser.blocks):
        assert isinstance(block, Block)
        weights |= _dit_block(block, denoiser.time, table, f"transformer_blocks.{i}")
    exported.load_state_dict(weights)
    return exported.eval()


def _dit_block(block: Block, time: nn.Sequential, table: Tensor, prefix: str) -> dict[str, Tensor]:
    """Return one block's weights under diffusers' names."""
    layers: dict[str, nn.Module] = {
        "norm1.linear": block.modulation,
        "norm1.emb.timestep_embedder.linear_1": time[0],
        "norm1.emb.timestep_embedder.linear_2": time[2],
        "attn1.to_q": block.query,
        "attn1.to_k": block.key,
        "attn1.to_v": block.value,
        "attn1.to_out.0": block.out,
        "ff.net.0.proj": block.mlp[0],
        "ff.net.2": block.mlp[2],
    }
    weights = {f"{prefix}.norm1.emb.class_embedder.embedding_table.weight": table}
    for name, layer in layers.items():
        weights |= named(layer, f"{prefix}.{name}")
    return weights


def named(layer: nn.Module, name: str) -> dict[str, Tensor]:
    """Return a layer's weights as `<name>.weight` and `<name>.bias`."""
    return {f"{name}.{key}": value for key, value in layer.state_dict().items()}
