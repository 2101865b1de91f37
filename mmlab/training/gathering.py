"""Whole weights of sharded parts, for a run's artifacts: mapped from a file, so that no rank holds them in memory."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule

from mmlab.runs.disk import writing
from mmlab.training.sharded_checkpoint import bytes_of
from mmlab.training.trainable import parts_of
from mmlab.weights import is_sharded

ALIGNED = 64
"""Each tensor begins in the file at a multiple of so many bytes."""


def gather(model: nn.Module, names: Iterable[str], adapted: Collection[str], folder: Path) -> None:
    """Give sharded parts whole weights on the first rank. All ranks call it, after the training.

    The weights are gathered one by one, and mapped from an unnamed file in `folder`, whose space is freed with them.
    Parts that are not sharded stay as they are.

    Args:
        model: its direct children are the parts.
        names: of parts, or dotted names inside a part.
        adapted: parts of which only the adapter is needed.
        folder: on a disk with space for all these weights.

    Raises:
        RunError: on the first rank, if the disk is full.
    """
    parts = {name: parts_of(model)[name] for name in dict.fromkeys(name.split(".")[0] for name in names)}
    weights = {
        weight: None
        for name, part in parts.items()
        for weight in part.parameters()
        if is_sharded(weight) and (weight.requires_grad or name not in adapted)
    }
    if not weights:
        return
    whole = _gathered(list(weights), folder)
    if distributed.get_rank() > 0:
        return
    for name, part in parts.items():
        _replace(part, dict(zip(weights, whole, strict=True)))
        if name not in adapted:  # an adapted part still has sharded weights, which must stay on their device
            part.to("cpu")


@torch.no_grad()
def _gathered(weights: Sequence[Any], folder: Path) -> list[Tensor]:
    """Whole tensors of sharded ones, mapped from a file, on the first rank; nothing on the others."""
    first = distributed.get_rank() == 0
    fault: OSError | None = None
    places: list[int] = []
    with writing(folder / "artifacts"), TemporaryFile(dir=folder) if first else nullcontext() as file:
        for weight in weights:
            whole = weight.full_tensor()
            if file is not None and fault is None:
                try:
                    places.append(_append(file, whole))
                except OSError as error:  # the other ranks still send what is left
                    fault = error
            del whole  # before the next one is received
        if fault is not None:
            raise fault
        if file is None:
            return []
        file.flush()
        buffer = mmap(file.fileno(), 0, access=ACCESS_COPY)
    return [
        torch.frombuffer(buffer, dtype=weight.dtype, count=weight.numel(), offset=place).view(weight.shape)
        for weight, place in zip(weights, places, strict=True)
    ]


def _append(file: BinaryIO, tensor: Tensor) -> int:
    """Write the values of a tensor; returns their place."""
    file.write(bytes(-file.tell() % ALIGNED))
    place = file.tell()
    file.write(bytes_of(tensor))
    return place


def _replace(part: nn.Module, whole: Mapping[nn.Parameter, Tensor]) -> None:
    """Put whole weights in the place of sharded ones, tied ones too, and restore the classes that FSDP replaced."""
    new = {old: nn.Parameter(tensor, old.requires_grad) for old, tensor in whole.items()}
    for module in part.modules():
        for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if weight in new:
                module.register_parameter(name, new[weight])
        if isinstance(module, FSDPModule):
            module.__class__ = type(module).__mro__[module._orig_cls_mro_index]
