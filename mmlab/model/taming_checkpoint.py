"""VQ autoencoders of taming-transformers and latent diffusion, converted weight by weight.

Their checkpoints do not contain the architecture; it follows from the names and shapes of the weights.

Legend: K codes, D width of a code.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.model.autoencoder import VQAutoencoder
from mmlab.model.config import GumbelQuantizerConfig, VectorQuantizerConfig, VQAutoencoderConfig
from mmlab.model.first_stage import STATISTICS
from mmlab.model.foreign_checkpoint import Foreign, ForeignCheckpoint, StoredTensor
from mmlab.model.gumbel_quantizer import GumbelQuantizer
from mmlab.model.quantizer import Quantizer, VectorQuantizer
from mmlab.weights import fill

PREFIX = "first_stage_model."
"""Prefix of the autoencoder's names in a checkpoint of a whole latent diffusion model or transformer."""
PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
EMA_DECAY = 0.99
"""Of EMAVectorQuantizer; its checkpoints do not hold it."""


def read_taming(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of an autoencoder in a checkpoint, under their original names, as fp32.

    Args:
        path: a `.ckpt` of Lightning, of which only the tensors are read and no code is run, whatever it holds beside
            them; or the same weights as `.safetensors`.

    Raises:
        ConfigError: no such file, a file of another kind, or no VQ autoencoder in it.
    """
    path = Path(path)
    try:
        stored, checkpoint = _opened(path)
        if isinstance(stored, Foreign):
            raise ConfigError(
                f"{path} holds a {type(stored).__module__}.{type(stored).__name__}, not a dict of weights; save its"
                " state_dict."
            )
        weights = stored.get("state_dict", stored) if isinstance(stored, Mapping) else {}
        weights = {str(name): value for name, value in weights.items() if isinstance(value, Tensor | StoredTensor)}
        prefix = PREFIX if any(name.startswith(PREFIX) for name in weights) else ""
        named = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        wanted: Any = {name: value for name, value in named.items() if name.startswith(PARTS)}
        if not any(name.startswith("quantize.") for name in wanted):
            contents = ", ".join(sorted({name.split(".")[0] for name in weights})[:6]) or "no weights"
            raise ConfigError(
                f"{path} has no VQ autoencoder of taming-transformers or latent diffusion; it contains {contents}."
            )
        tensors = wanted if checkpoint is None else checkpoint.tensors(wanted)
    except ValueError as error:
        raise ConfigError(f"{path} is not a checkpoint of tensors: {error}.") from error
    except (UnpicklingError, EOFError) as error:
        # torch's own message suggests running it nevertheless.
        named = re.search(r"GLOBAL (\S+)", str(error))
        of = f"; in torch's format before 1.6 it names {named[1]}, so save it again with a later torch" if named else ""
        raise ConfigError(f"{path} is not a checkpoint of only tensors and plain data{of}.") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{path} cannot be read as a checkpoint of tensors: {reason}") from error
    return {name: value.float() for name, value in tensors.items()}


def _opened(path: Path) -> tuple[Any, ForeignCheckpoint | None]:
    """Return what a file holds, and the file itself if its tensors are still to be read."""
    if path.suffix == ".safetensors":
        return load_file(path), None
    if not is_zipfile(path):  # torch before 1.6
        return torch.load(path, map_location="cpu", weights_only=True), None
    checkpoint = ForeignCheckpoint(path)
    return checkpoint.content, checkpoint


def from_taming(weights: Mapping[str, Tensor], source: str | Path, legacy: bool = True) -> VQAutoencoder:
    """Build the autoencoder that the weights belong to, and fill it.

    Args:
        weights: of `read_taming`.
        source: where they come from, for messages.
        legacy: keep β on the codebook term, as the model was trained.

    Raises:
        ConfigError: weights of another architecture.
    """
    try:
        model = VQAutoencoder(VQAutoencoderConfig(architecture=architecture_of(weights)), quantizer_of(weights, legacy))
        renamed = dict(_renamed(weights))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{source} is not a VQ autoencoder of a known layout: {error} is missing or unknown."
        ) from error
    # Counters of training and statistics measured after it are not in such checkpoints.
    own = {name: value for name, value in model.state_dict().items() if name not in renamed and _is_own(name)}
    fill(model, {**renamed, **own}, source)
    model.untrained = False
    return model


def architecture_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of `VQAutoencoder`'s architecture that follow from the weights.

    Raises:
        KeyError: a weight that every such model has.
    """
    levels = _count(weights, "encoder.down.")
    blocks = _count(weights, "encoder.down.0.block.")
    attention = [f"encoder.down.{level}.attn.0.q.weight" in weights for level in range(levels)]
    kinds = ["Attn" if attends else "" for attends in attention]
    return {
        "block_out_channels": [len(weights[f"encoder.down.{n}.block.0.conv1.weight"]) for n in range(levels)],
        "layers_per_block": blocks,
        "latent_channels": len(weights["encoder.conv_out.weight"]),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
    }


def _count(weights: Mapping[str, Tensor], before: str) -> int:
    """Count the numbers, from 0 on, that follow `before` in the weights' names; raises KeyError if there are none."""
    numbers = [int(name.removeprefix(before).split(".")[0]) for name in weights if name.startswith(before)]
    if not numbers:
        raise KeyError(f"{before}0")
    return 1 + max(numbers)


def quantizer_of(weights: Mapping[str, Tensor], legacy: bool = True) -> Quantizer:
    """Build a codebook of the checkpoint's kind and size: nearest codes, if need be with averages, or Gumbel softmax.

    Raises:
        ConfigError: a quantizer of another kind.
    """
    names = {name.removeprefix("quantize.") for name in weights if name.startswith("quantize.")}
    if names == {"embed.weight", "proj.weight", "proj.bias"}:
        codes, width = weights["quantize.embed.weight"].shape
        return GumbelQuantizer(GumbelQuantizerConfig(codes=codes, width=width))
    averages = {"embedding.cluster_size", "embedding.embed_avg"}
    if names - averages != {"embedding.weight"}:
        raise ConfigError(
            f"The quantizer has the weights {', '.join(sorted(names)[:6])}; taming-transformers' VectorQuantizer,"
            " EMAVectorQuantizer and GumbelQuantize, without remap, can be converted."
        )
    codes, width = weights["quantize.embedding.weight"].shape
    ema = EMA_DECAY if averages <= names else None
    config = VectorQuantizerConfig(codes=codes, width=width, normalize=False, legacy=legacy and ema is None, ema=ema)
    return VectorQuantizer(config)


def settings_of(model: VQAutoencoder) -> dict[str, Any]:
    """Return the settings of `model.first_stage` that build such a model."""
    return {"architecture": model.architecture, "quantizer": asdict(model.quantizer.config)}


def _renamed(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield our name of each weight, and the weight: attention's 1x1 convolutions are linear layers here."""
    levels = len(architecture_of(weights)["block_out_channels"])
    if "quantize.embedding.cluster_size" in weights:
        # Their sums are not used: released code forgot to update them in place.
        uses, book = weights["quantize.embedding.cluster_size"].clamp(min=1e-5), weights["quantize.embedding.weight"]
        yield from (("quantizer.ema_uses", uses), ("quantizer.ema_sums", uses[:, None] * book))
    whole = {
        "quantize.embedding.weight": "quantizer.codebook",
        "quantize.embed.weight": "quantizer.codebook",
        "quantize.proj.weight": "quantizer.logits.weight",
        "quantize.proj.bias": "quantizer.logits.bias",
    }
    for name, value in weights.items():
        if name in ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg"):
            continue
        ours = whole.get(name) or _layer(name, levels)
        linear = ".attentions." in ours and value.ndim == 4
        yield ours, value[:, :, 0, 0] if linear else value


def _layer(name: str, levels: int) -> str:
    """Return our name of a weight of encoder or decoder; raises ValueError for an unknown one."""
    if name.startswith(("quant_conv.", "post_quant_conv.")):
        return name
    half, _, rest = name.partition(".")
    if rest.startswith("conv_"):
        return name
    if match := re.fullmatch(r"norm_out\.(\w+)", rest):
        return f"{half}.conv_norm_out.{match[1]}"
    if match := re.fullmatch(r"mid\.block_([12])\.(\w+)\.(\w+)", rest):
        return f"{half}.mid_block.resnets.{int(match[1]) - 1}.{RESNET[match[2]]}.{match[3]}"
    if match := re.fullmatch(r"mid\.attn_1\.(\w+)\.(\w+)", rest):
        return f"{half}.mid_block.attentions.0.{ATTENTION[match[1]]}.{match[2]}"
    if not (match := re.fullmatch(r"(down|up)\.(\d+)\.(.+)", rest)):
        raise ValueError(name)
    # Their decoder's levels are numbered from the image on, ours in the order of their use.
    level = int(match[2]) if match[1] == "down" else levels - 1 - int(match[2])
    block, inner = f"{half}.{match[1]}_blocks.{level}", match[3]
    if part := re.fullmatch(r"block\.(\d+)\.(\w+)\.(\w+)", inner):
        return f"{block}.resnets.{part[1]}.{RESNET[part[2]]}.{part[3]}"
    if part := re.fullmatch(r"attn\.(\d+)\.(\w+)\.(\w+)", inner):
        return f"{block}.attentions.{part[1]}.{ATTENTION[part[2]]}.{part[3]}"
    if part := re.fullmatch(r"(down|up)sample\.conv\.(\w+)", inner):
        return f"{block}.{part[1]}samplers.0.conv.{part[2]}"
    raise ValueError(name)


def _is_own(name: str) -> bool:
    return name in (*STATISTICS, "quantizer.uses", "quantizer.temperature")
