"""VQ autoencoders of taming-transformers and latent diffusion as ours, weight by weight.

Their checkpoints hold no architecture, but the names and shapes of the weights tell it.

Legend: K codes, D width of a code.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.model.autoencoder import VQAutoencoder
from mmlab.model.config import GumbelQuantizerConfig, VectorQuantizerConfig, VQAutoencoderConfig
from mmlab.model.gumbel_quantizer import GumbelQuantizer
from mmlab.model.quantizer import Quantizer, VectorQuantizer
from mmlab.weights import fill

PREFIX = "first_stage_model."
"""Before the autoencoder's names, in a checkpoint of a whole latent diffusion or transformer."""
PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
HARMLESS = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)
"""Classes that Lightning's old checkpoints name; nothing of them is run, or needed."""


def read_taming(path: str | Path) -> dict[str, Tensor]:
    """The weights of an autoencoder in a checkpoint, by their names there, fp32.

    Args:
        path: a `.ckpt` of Lightning, or the same weights as `.safetensors`. Of a `.ckpt` tensors and plain data are
            read, and nothing is run.

    Raises:
        ConfigError: no such file, more than plain data, or no VQ autoencoder in it.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            stored: Any = load_file(path)
        else:
            with _names_that_run_nothing():
                stored = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, EOFError) as error:
        # torch's own words advise to run it all the same.
        raise ConfigError(f"{path} is no checkpoint of tensors and plain data alone.") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{path} cannot be read as a checkpoint of tensors and plain data: {reason}") from error
    weights = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    prefix = PREFIX if any(name.startswith(PREFIX) for name in weights) else ""
    named = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    found = {name: value.float() for name, value in named.items() if name.startswith(PARTS)}
    if not any(name.startswith("quantize.") for name in found):
        holds = ", ".join(sorted({name.split(".")[0] for name in weights})[:6]) or "no weights"
        raise ConfigError(f"{path} holds no VQ autoencoder of taming-transformers or latent diffusion, but {holds}.")
    return found


def from_taming(weights: Mapping[str, Tensor], source: str | Path, legacy: bool = True) -> VQAutoencoder:
    """Build the autoencoder that the weights belong to, and fill it.

    Args:
        weights: of `read_taming`.
        source: where they come from, for messages.
        legacy: whether its quantizer goes on with β on the codebook term, as it was trained.

    Raises:
        ConfigError: weights of another architecture.
    """
    try:
        model = VQAutoencoder(VQAutoencoderConfig(architecture=architecture_of(weights)), quantizer_of(weights, legacy))
        renamed = dict(_renamed(weights))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{source} is no VQ autoencoder of the known layout: {error} is missing or unknown."
        ) from error
    # What is counted while training, and measured after it, is not of the checkpoint.
    own = {name: value for name, value in model.state_dict().items() if name not in renamed and _is_own(name)}
    fill(model, {**renamed, **own}, source)
    model.unlearnt = False
    return model


def architecture_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `VQAutoencoder`'s architecture that the weights tell.

    Raises:
        KeyError: a weight that every such model has.
    """
    levels = _count(weights, "encoder.down.")
    blocks = _count(weights, "encoder.down.0.block.")
    attention = [f"encoder.down.{level}.attn.0.q.weight" in weights for level in range(levels)]
    kinds = [("Attn" if there else "", there) for there in attention]
    return {
        "block_out_channels": [len(weights[f"encoder.down.{n}.block.0.conv1.weight"]) for n in range(levels)],
        "layers_per_block": blocks,
        "latent_channels": len(weights["encoder.conv_out.weight"]),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind, _ in kinds],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind, _ in reversed(kinds)],
    }


def _count(weights: Mapping[str, Tensor], before: str) -> int:
    """How many numbers stand behind `before` in the weights' names, from 0 on; raises KeyError where none does."""
    numbers = [int(name.removeprefix(before).split(".")[0]) for name in weights if name.startswith(before)]
    if not numbers:
        raise KeyError(f"{before}0")
    return 1 + max(numbers)


def quantizer_of(weights: Mapping[str, Tensor], legacy: bool = True) -> Quantizer:
    """A codebook of the checkpoint's kind and size: nearest codes, or VQGAN's Gumbel softmax."""
    if "quantize.proj.weight" in weights:
        codes, width = weights["quantize.embed.weight"].shape
        return GumbelQuantizer(GumbelQuantizerConfig(codes=codes, width=width))
    codes, width = weights["quantize.embedding.weight"].shape
    return VectorQuantizer(VectorQuantizerConfig(codes=codes, width=width, normalize=False, legacy=legacy))


def settings_of(model: VQAutoencoder) -> dict[str, Any]:
    """The config of `model.first_stage` that builds such a model."""
    book = model.quantizer
    quantizer: dict[str, Any] = {"codes": book.codes, "width": book.width}
    if isinstance(book, VectorQuantizer):
        quantizer |= {"normalize": book.normalize, "legacy": book.legacy}
    return {"architecture": model.architecture, "quantizer": quantizer}


def _renamed(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our name of each weight, and the weight: attention's 1x1 convolutions are linear layers here."""
    levels = len(architecture_of(weights)["block_out_channels"])
    whole = {
        "quantize.embedding.weight": "quantizer.codebook",
        "quantize.embed.weight": "quantizer.codebook",
        "quantize.proj.weight": "quantizer.logits.weight",
        "quantize.proj.bias": "quantizer.logits.bias",
    }
    for name, value in weights.items():
        ours = whole.get(name) or _layer(name, levels)
        linear = ".attentions." in ours and value.ndim == 4
        yield ours, value[:, :, 0, 0] if linear else value


def _layer(name: str, levels: int) -> str:
    """Our name of a weight of encoder or decoder; raises ValueError for an unknown one."""
    if name.startswith(("quant_conv.", "post_quant_conv.")):
        return name
    half, _, rest = name.partition(".")
    if rest.startswith("conv_"):
        return name
    if found := re.fullmatch(r"norm_out\.(\w+)", rest):
        return f"{half}.conv_norm_out.{found[1]}"
    if found := re.fullmatch(r"mid\.block_([12])\.(\w+)\.(\w+)", rest):
        return f"{half}.mid_block.resnets.{int(found[1]) - 1}.{RESNET[found[2]]}.{found[3]}"
    if found := re.fullmatch(r"mid\.attn_1\.(\w+)\.(\w+)", rest):
        return f"{half}.mid_block.attentions.0.{ATTENTION[found[1]]}.{found[2]}"
    if not (found := re.fullmatch(r"(down|up)\.(\d+)\.(.+)", rest)):
        raise ValueError(name)
    # The decoder's levels are numbered from the picture on, and here in the order of their use.
    level = int(found[2]) if found[1] == "down" else levels - 1 - int(found[2])
    block, inner = f"{half}.{found[1]}_blocks.{level}", found[3]
    if part := re.fullmatch(r"block\.(\d+)\.(\w+)\.(\w+)", inner):
        return f"{block}.resnets.{part[1]}.{RESNET[part[2]]}.{part[3]}"
    if part := re.fullmatch(r"attn\.(\d+)\.(\w+)\.(\w+)", inner):
        return f"{block}.attentions.{part[1]}.{ATTENTION[part[2]]}.{part[3]}"
    if part := re.fullmatch(r"(down|up)sample\.conv\.(\w+)", inner):
        return f"{block}.{part[1]}samplers.0.conv.{part[2]}"
    raise ValueError(name)


def _is_own(name: str) -> bool:
    return name in ("latent_mean", "latent_std", "statistics_known", "quantizer.uses", "quantizer.temperature")


@contextmanager
def _names_that_run_nothing() -> Iterator[None]:
    """Let a checkpoint name `HARMLESS` classes, each of which stands for an empty one."""
    stand_ins: Any = [(type(name.rpartition(".")[2], (), {}), name) for name in HARMLESS]
    with torch.serialization.safe_globals(stand_ins):
        yield
