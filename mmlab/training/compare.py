"""Where two states of a run differ, bit by bit."""

from collections.abc import Mapping
from typing import Any

import torch

# Lightning's counter of validation batches counts a validation that was cut off and made up for twice; nothing
# depends on it. The speed of two runs is never the same.
NOT_COMPARED = (".loops.fit_loop.epoch_loop.val_loop", ".callbacks.Checkpoints.metrics.perf/")


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """The first place where two nested states (dicts, lists, tensors, plain data) are not the same, or None.

    Tensors must have the same dtype, shape and bits; NaN equals NaN.
    """
    if where.startswith(NOT_COMPARED):
        return None
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return _tensors(a, b, where)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        lacking = [key for key in {**a, **b} if key not in a or key not in b]
        lacking = [key for key in lacking if not f"{where}.{key}".startswith(NOT_COMPARED)]
        if lacking:
            return f"{where.lstrip('.')}: only one of them has {lacking[0]!r}"
        pairs = [(key, a[key], b[key]) for key in a if key in b]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{where.lstrip('.')}: {len(a)} items and {len(b)}"
        pairs = [(str(i), x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        same = type(a) is type(b) and (a == b or (a != a and b != b))
        return None if same else f"{where.lstrip('.')}: {a!r} and {b!r}"
    found = (difference(x, y, f"{where}.{key}") for key, x, y in pairs)
    return next((one for one in found if one is not None), None)


def _tensors(a: torch.Tensor, b: torch.Tensor, where: str) -> str | None:
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{where.lstrip('.')}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
    unequal = a != b
    if a.is_floating_point():
        unequal &= ~(a.isnan() & b.isnan())
    count = int(unequal.sum())
    if not count:
        return None
    most = float((a.double() - b.double()).abs().max())
    return f"{where.lstrip('.')}: {count} of {a.numel()} numbers differ, by up to {most:.3g}"
