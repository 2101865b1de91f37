"""The sharded tensors of a checkpoint: each rank writes its rows, and reads its own, whatever ranks wrote them.

In the state of such a checkpoint a note, `{"sharded": name, "shape": [64, 8], "dtype": "float32"}`, stands for each
sharded tensor. The name is its place in the state, such as `optimizer_states/0/state/3/exp_avg`. Its rows are in the
safetensors files of the ranks that have any; `rows` in a file's header has the first row of each tensor.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mmlab.config.errors import RunError
from mmlab.runs.disk import to_json
from mmlab.weights import is_sharded, local

_NOTE = {"sharded", "shape", "dtype"}
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""dtype → its name in safetensors."""


class Writable(Protocol):
    def write(self, data: Any, /) -> Any: ...


class Stored:
    """A sharded tensor of a checkpoint, mapped from its files: only rows that are copied are read.

    Args:
        name: its place in the state.
        shape: of the whole tensor.
        dtype: of the whole tensor.
        pieces: for each file with rows of it, the first one and the safetensors slice.

    Raises:
        RunError: rows are missing.
    """

    def __init__(self, name: str, shape: Iterable[int], dtype: torch.dtype, pieces: Iterable[tuple[int, Any]]):
        self.shape, self.dtype = torch.Size(shape), dtype
        counted = ((first, rows.get_shape()[0], rows) for first, rows in pieces)
        self._pieces = sorted(counted, key=lambda piece: piece[0])
        end = 0
        for first, count, _ in self._pieces:
            if first != end:
                break
            end += count
        if self.shape.numel() and end != self.shape[0]:
            raise RunError(f"The checkpoint lacks rows of {name}: row {end} of {self.shape[0]} is missing.")

    def __deepcopy__(self, memo: Any) -> "Stored":
        """Itself: Lightning copies the state of each callback, which may hold an average of all weights."""
        return self

    def copy_rows(self, first: int, target: Tensor) -> None:
        """Fill `target` with the rows from `first` on."""
        end = first + len(target)
        for start, count, rows in self._pieces:
            low, high = max(first, start), min(end, start + count)
            if low < high:
                target[low - first : high - first].copy_(rows[low - start : high - start])

    def whole(self) -> Tensor:
        """All rows, on the CPU."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.copy_rows(0, tensor)
        return tensor


class Mapped(Tensor):
    """A whole tensor of a checkpoint, mapped from its file."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __deepcopy__(self, memo: Any) -> "Mapped":
        """Itself, see `Stored`."""
        return self


# Writing


def sharded_tensors(state: Any) -> dict[str, Tensor]:
    """Name → sharded tensor of a nested state, in the order that all ranks have."""
    tensors: dict[str, Tensor] = {}

    def note(name: str, leaf: Any) -> None:
        if isinstance(leaf, Tensor) and is_sharded(leaf):
            tensors[name] = leaf

    _replace(state, note)
    return tensors


def tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name of each tensor that shares its memory with an earlier one → the name of that one.

    Only right on the first rank: shares of other ranks may be empty.
    """
    names: dict[Any, str] = {}
    same: dict[str, str] = {}
    for name, tensor in tensors.items():
        share = local(tensor)
        first = names.setdefault((share.data_ptr(), share.dtype, tensor.shape, share.stride()), name)
        if first != name and share.numel():
            same[name] = first
    return same


def with_notes(state: Any, same: Mapping[str, str]) -> Any:
    """A copy of a nested state with a note in place of each sharded tensor; other leaves are not copied.

    Args:
        state: nested dicts, lists and tuples.
        same: see `tied`.
    """

    def note(name: str, leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and is_sharded(leaf)):
            return leaf
        dtype = str(leaf.dtype).removeprefix("torch.")
        return {"sharded": same.get(name, name), "shape": list(leaf.shape), "dtype": dtype}

    return _replace(state, note)


def write_rows(tensors: Mapping[str, Tensor], file: Writable) -> None:
    """Write this rank's rows of sharded tensors as safetensors, copying one tensor at a time from the device.

    The library would copy all of them first, and hide why a write failed.

    Raises:
        OSError: the disk is full or fails.
    """
    shares = {name: local(tensor).detach() for name, tensor in tensors.items()}
    # Wider dtypes first, as the library does: every tensor is then aligned to its dtype.
    names = sorted((name for name, share in shares.items() if share.numel()), key=lambda name: -shares[name].itemsize)
    rows = to_json({name: _first_row(tensors[name]) for name in names})
    file.write(header_of({name: (shares[name].dtype, shares[name].shape) for name in names}, {"rows": rows}))
    for name in names:
        file.write(bytes_of(shares[name]))


def header_of(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file, after which the `bytes_of` its tensors follow in their order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = to_json(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> memoryview:
    """The values of a tensor, on the CPU and in order."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


# Reading


def join(state: Any, files: Iterable[Path]) -> Any:
    """A nested state with a `Stored` in place of each note."""
    pieces: dict[str, list[tuple[int, Any]]] = {}
    for path in files:
        file = safe_open(path, framework="pt")
        for name, first in json.loads(file.metadata()["rows"]).items():
            pieces.setdefault(name, []).append((first, file.get_slice(name)))

    def stored(name: str, leaf: Any) -> Any:
        if not _is_note(leaf):
            return leaf
        name = leaf["sharded"]
        return Stored(name, leaf["shape"], getattr(torch, leaf["dtype"]), pieces.get(name, ()))

    return _replace(state, stored)


def mapped(state: Any) -> Any:
    """A nested state whose tensors are `Mapped`."""
    return _replace(state, lambda name, leaf: leaf.as_subclass(Mapped) if isinstance(leaf, Tensor) else leaf)


def read_whole(state: Any) -> Any:
    """A nested state with whole tensors in place of `Stored` ones; tied ones are read twice."""
    return _replace(state, lambda name, leaf: leaf.whole() if isinstance(leaf, Stored) else leaf)


@torch.no_grad()
def copy_into(target: Tensor, stored: Tensor | Stored) -> None:
    """Copy a tensor of a checkpoint into `target`; if that is sharded, only this rank's rows are read.

    Raises:
        RunError: they have different shapes.
    """
    share, first = local(target), _first_row(target) if is_sharded(target) else 0
    if target.shape != stored.shape:
        raise RunError(f"The checkpoint has a tensor of shape {list(stored.shape)} for one of {list(target.shape)}.")
    if isinstance(stored, Stored):
        stored.copy_rows(first, share)
    elif is_sharded(stored) or not is_sharded(target):
        share.copy_(local(stored))
    else:
        share.copy_(stored[first : first + len(share)])


def like(parameter: Any, stored: Tensor | Stored) -> Tensor:
    """A copy of a tensor of a checkpoint, in its dtype, on the device of a parameter of its shape and sharded like it.

    Raises:
        RunError: they have different shapes.
    """
    if not is_sharded(parameter):
        new = torch.empty_like(parameter.detach(), dtype=stored.dtype)
    else:
        from torch.distributed.tensor import DTensor

        share = torch.empty_like(parameter.detach().to_local(), dtype=stored.dtype)
        mesh, placements = parameter.device_mesh, parameter.placements
        # Without shape and stride, those of uneven shares would be guessed wrongly.
        place: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride()}
        new = DTensor.from_local(share, mesh, placements, run_check=False, **place)
    copy_into(new, stored)
    return new


def restore_module(module: nn.Module, stored: Mapping[str, Tensor | Stored], strict: bool) -> None:
    """`load_state_dict` of a module that is sharded, tensor by tensor.

    Raises:
        RunError: names differ and `strict` is set, or shapes differ.
    """
    own = module.state_dict()
    if strict and (names := sorted(own.keys() ^ stored.keys())):
        raise RunError(f"The checkpoint has other weights than this run, such as {names[0]}.")
    for name in own.keys() & stored.keys():
        copy_into(own[name], stored[name])


def restore_optimizer(optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    """`load_state_dict` of an optimizer whose parameters are sharded: their state is sharded like them.

    It computes as it was built to: the fused kernel of a run on one CPU takes no sharded weights.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = [name for group in stored["param_groups"] for name in group["params"]]
    own = dict(zip(names, parameters, strict=True))

    def own_form(parameter: Tensor, value: Any) -> Any:
        same = isinstance(value, Tensor) and is_sharded(parameter) and value.shape == parameter.shape
        if isinstance(value, Stored) or same:
            return like(parameter, value)
        # Not mapped any more: the optimizer keeps it, and the file may be removed.
        return value.clone() if isinstance(value, Tensor) else value

    state = {
        name: {key: own_form(own[name], value) for key, value in values.items()}
        for name, values in stored["state"].items()
    }
    groups = [
        {**group, **{name: here[name] for name in ("foreach", "fused")}}
        for group, here in zip(stored["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _first_row(tensor: Any) -> int:
    """First row that this rank has of a sharded tensor."""
    from torch.distributed.tensor import Shard

    mesh, rows = tensor.device_mesh, tensor.shape[0]
    assert mesh.ndim == 1 and tuple(tensor.placements) == (Shard(0),), f"sharded otherwise: {tensor.placements}"
    return min(rows, mesh.get_local_rank() * -(-rows // mesh.size()))


def _is_note(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == _NOTE


def _replace(value: Any, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """A copy of nested dicts, lists and tuples with `change(name, leaf)` in place of each leaf."""
    if isinstance(value, Mapping) and not _is_note(value):
        return {key: _replace(item, change, f"{name}/{key}" if name else str(key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        items = [_replace(item, change, f"{name}/{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return change(name, value)
