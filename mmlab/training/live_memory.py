"""Memory of a computation on fake tensors, which have shapes and no values: what is alive at its peak."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmlab.weights import local

ATEN: Any = torch.ops.aten


class LiveMemory(TorchDispatchMode):
    """Adds up the bytes of the storages that are alive, within its context; put it inside a `FakeTensorMode`.

    Results that depend on values are assumed: a mask selects `selected` positions, and a condition is false. Workspaces
    of kernels and fragmentation of the allocator are not included.

    Args:
        selected: positions that a bool mask selects, at most all.

    Attributes:
        now: bytes of the tensors that were made within the context and are alive.
        peak: highest value of `now` since `restart`.
        gradients: bytes of the gradients so far, which the caller sets.
        gradients_at_peak: its value at the peak.
    """

    def __init__(self, selected: int = 0):
        super().__init__()
        self.selected = selected
        self.now = self.peak = self.gradients = self.gradients_at_peak = 0
        self._storages: dict[int, tuple[Any, int]] = {}  # id → (reference that notes its end, bytes)

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak, self.gradients_at_peak = self.now, self.gradients

    def __enter__(self) -> "LiveMemory":
        super().__enter__()
        # FSDP frees gathered weights by resizing their storage, which no dispatch mode sees.
        resize = self._resize = torch.UntypedStorage.resize_

        def noted(storage: torch.UntypedStorage, size: Any) -> Any:
            out = resize(storage, size)
            if id(storage) in self._storages:
                self._count(storage)
            return out

        torch.UntypedStorage.resize_ = noted  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._run(func, args, kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(local(tensor).untyped_storage())
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is ATEN.index.Tensor:
            tensor, indices = args
            args = tensor, [place for index in indices for place in self._places(index)]
        elif func is ATEN.bincount.default:
            return args[0].new_empty(max([1, *args[2:], kwargs.get("minlength", 1)]))
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:
            return args[0].dtype != torch.bool

    def _places(self, index: Tensor | None) -> list[Tensor | None]:
        """The integers that stand for a bool index, one tensor for each of its dimensions."""
        if index is None or index.dtype != torch.bool:
            return [index]
        count = min(self.selected, index.numel())
        return [index.new_zeros(count, dtype=torch.int64) for _ in range(index.ndim)]

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        reference, before = self._storages.get(key, (None, 0))
        if reference is None:
            reference = weakref.ref(storage, self._end(key))
        self._storages[key] = reference, size
        self.now += size - before
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self.gradients

    def _end(self, key: int) -> Callable[[Any], None]:
        def freed(_: Any) -> None:
            self.now -= self._storages.pop(key)[1]

        return freed
