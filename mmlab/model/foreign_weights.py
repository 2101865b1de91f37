"""Weights of another code base's checkpoint as those of a transformers model: merged with an adapter, and written.

Legend: r rank of an adapter.
"""

from collections.abc import Iterator, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmlab.config.errors import ConfigError
from mmlab.model.checkpoint_files import SAFETENSORS, read_checkpoint
from mmlab.model.pretrained import common_dtype, quieten, without_report
from mmlab.runs.disk import to_json

SHARD = 1 << 30
"""Bytes of weights in a file, as fp32; that many are in memory while it is written."""
REFUSED = ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "modules_to_save", "lora_bias")
"""Settings of peft with which an adapter is more than two matrices beside a weight."""


class Merged(Mapping[str, Tensor]):
    """Weights with a LoRA adapter added, W + alpha / r · B A, each computed when it is asked for (arXiv 2106.09685).

    Args:
        base: weights by name.
        adapter: the matrices by name, as peft saves them.
        config: peft's.
        source: where the adapter comes from, for messages.

    Raises:
        ConfigError: an adapter of another kind, or one of other weights.
    """

    def __init__(
        self, base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], config: Mapping[str, Any], source: Path
    ):
        self.base, self.matrices = base, matrices_of(adapter, config, source)
        rank = config["r"]
        self.scale = config["lora_alpha"] / (sqrt(rank) if config.get("use_rslora") else rank)
        for name, pair in self.matrices.items():
            shape = [len(pair["B"]), pair["A"].shape[1]]
            if name not in base or list(base[name].shape) != shape:
                there = list(base[name].shape) if name in base else "nothing"
                raise ConfigError(
                    f"{source} adapts {name} of shape {shape}, which is {there} in the base; give the base that the "
                    "adapter was trained on."
                )

    def __getitem__(self, name: str) -> Tensor:
        weight, pair = self.base[name], self.matrices.get(name)
        if pair is None:
            return weight
        return (weight.float() + self.scale * (pair["B"].float() @ pair["A"].float())).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def matrices_of(adapter: Mapping[str, Tensor], config: Mapping[str, Any], source: Path) -> dict[str, dict[str, Tensor]]:
    """Name of a weight → its matrices A and B, of a LoRA adapter in peft's format.

    Raises:
        ConfigError: an adapter of another kind.
    """
    kind, bias = config.get("peft_type", "LORA"), config.get("bias", "none")
    others = [f"peft_type={kind}"] * (kind != "LORA") + [f"bias={bias}"] * (bias != "none")
    if others := others + [name for name in REFUSED if config.get(name)]:
        raise ConfigError(f"{source} is an adapter with {others[0]}; plain LoRA of linear layers can be converted.")
    matrices: dict[str, dict[str, Tensor]] = {}
    for name, value in adapter.items():
        layer, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
        if rest not in ("A.weight", "B.weight", "A.default.weight", "B.default.weight"):
            raise ConfigError(f"{source} is an adapter with {name}; plain LoRA of linear layers can be converted.")
        matrices.setdefault(f"{layer}.weight", {})[rest[0]] = value
    if half := next((name for name, pair in matrices.items() if len(pair) < 2), None):
        raise ConfigError(f"{source} is not complete: it has only one of the two matrices of {half}.")
    return matrices


def write_model(folder: Path, model: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Write the weights of a transformers model, in the dtype in which they are stored.

    Args:
        folder: to be written to; its config is there.
        model: on the meta device; has the names and shapes.
        tensors: by the model's names, or older ones that transformers knows; of tied weights one is enough.
        source: where they come from, for messages.

    Returns:
        The model's state dict, mapped from what was written.

    Raises:
        ConfigError: weights that are missing, left over, or of another shape.
    """
    own = model.state_dict(keep_vars=True)
    if tensors.keys() - own.keys():
        tensors = _renamed(model, tensors)
    names: dict[int, str] = {}  # of tied weights, the first one that is stored
    for name in own:
        if name in tensors:
            names.setdefault(id(own[name]), name)
    missing = [name for name in own if id(own[name]) not in names]
    if wrong := missing or sorted(tensors.keys() - own.keys()):
        what = "lacks" if missing else "has, without a place for it,"
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ConfigError(
            f"{source} does not fit the {type(model).__name__} of its config: it {what} {wrong[0]}{more}."
        )
    files = _files({name: own[name] for name in names.values()})
    for file, keys in files.items():
        save_file({key: _fitting(tensors[key], own[key], key, source) for key in keys}, folder / file, {"format": "pt"})
    if len(files) > 1:
        places = {key: file for file, keys in files.items() for key in keys}
        size = sum((folder / file).stat().st_size for file in files)
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / f"{SAFETENSORS}.index.json").write_text(to_json(index, indent=2) + "\n")
    written = read_checkpoint(folder)
    return {name: written[names[id(value)]] for name, value in own.items()}


def _renamed(model: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors by the names that transformers gives them when it reads a checkpoint; as they are where some are left."""
    quieten()
    options = {"config": model.config, "dtype": common_dtype(tensors), "output_loading_info": True}
    with torch.device("cpu"), without_report():
        stored, info = type(model).from_pretrained(None, state_dict=dict(tensors), **options)
    wrong = any(info[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    return tensors if wrong else stored.state_dict()


def _files(weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Name of a file → names of the weights in it, as transformers names shards."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, weight in weights.items():
        if groups[-1] and size + weight.nbytes > SHARD:
            groups, size = [*groups, []], 0
        groups[-1].append(name)
        size += weight.nbytes
    if len(groups) == 1:
        return {SAFETENSORS: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": names for n, names in enumerate(groups, 1)}


def _fitting(tensor: Tensor, own: Tensor, name: str, source: Path) -> Tensor:
    if tensor.shape != own.shape:
        raise ConfigError(
            f"{source} does not fit the model of its config: {name} is {list(tensor.shape)} there, and should be "
            f"{list(own.shape)}."
        )
    return tensor.detach().contiguous()
