"""Buffers that a cast of their module leaves as they are."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


def cast_all_but(module: nn.Module, names: Iterable[str], cast: Callable[[], Any]) -> nn.Module:
    """Move and cast a module by `cast`; the named buffers move, and keep the dtype and values that they had."""
    kept = {name: getattr(module, name) for name in names}
    cast()
    for name, value in kept.items():
        moved = getattr(module, name)
        if moved.dtype != value.dtype:
            setattr(module, name, value.to(moved.device))
    return module
