"""The weights of a module: filled strictly, finite, identified by a hash, and verified in the folder that has them."""

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from mmlab.config.errors import ConfigError, RunError

CARD = "card.json"
"""File beside the weights of a trained part; `files` in it has the hashes of the others."""
WEIGHTS = ".safetensors"
CHUNK = 1 << 20
"""Values that are copied and hashed at a time."""
_DIGESTS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Tensor → (its state, digest of its values, or of those that were stored before they were rounded to its dtype)."""
_AS_STORED = "as_stored"
"""Attribute of an empty weight whose dtype is that of the file."""
_READ_IN = "read_in"
"""Attribute of a weight that was read as stored: the dtype that it was to be read in."""
_IDENTITIES: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Module whose values follow from others by a computation that rounds → its hash, see `note_identity`."""


def fill(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Fill a module with weights of the same names and shapes, strictly.

    A module on the meta device takes over the tensors; another one copies them. Dtypes and `requires_grad` stay. A
    tensor is cast only if the module has another dtype, so tensors that are mapped from a file stay mapped. What is
    rounded by the cast is hashed before, see `content_hash`.

    Args:
        module: the module.
        weights: tensors by name; a dict is emptied meanwhile, so that each is freed once it is cast.
        source: where they come from, for messages.

    Raises:
        ConfigError: other names or shapes, or whole numbers in place of weights.
        RunError: values that are not finite.
    """
    own = module.state_dict()
    for key in sorted(weights.keys() | own.keys()):
        stored = list(weights[key].shape) if key in weights else "nothing"
        needed = list(own[key].shape) if key in own else "nothing"
        if stored != needed:
            raise ConfigError(f"{source} does not fit the model: {key} is {stored} there and {needed} here.")
        if own[key].is_floating_point() and not weights[key].is_floating_point():
            raise ConfigError(f"{source} has quantized weights ({key} is {weights[key].dtype}), which are not read.")
    if any(tensor.is_meta for tensor in own.values()):
        _take_over(module, weights if isinstance(weights, dict) else dict(weights))
    else:
        module.load_state_dict(weights)
    require_finite(module, source)


def read_as_stored(module: nn.Module) -> None:
    """Let `fill` give a module on the meta device the dtypes of the file, from which all weights then stay mapped."""
    for weight in module.parameters():
        setattr(weight, _AS_STORED, True)


def read_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that a weight has, or would have if it had not been read as stored."""
    return weight.__dict__.get(_READ_IN, weight.dtype)


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a sharded tensor, without a copy; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank has only a share of a tensor's values."""
    return hasattr(tensor, "to_local")  # a DTensor, whose module takes half a second to import


def whole(tensor: Tensor) -> Tensor:
    """All values of a sharded tensor, for which all ranks call it; any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def set_rows(tensor: Any, values: Tensor) -> None:
    """Set a tensor to values of its shape; of a sharded one, this rank's rows."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    if values is not tensor:
        tensor.copy_(values)


def _take_over(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Assign tensors to a module on the meta device, cast to its dtypes, and note the digests of what was rounded."""
    own = module.state_dict(keep_vars=True)
    dtypes = {key: weights[key].dtype if _AS_STORED in tensor.__dict__ else tensor.dtype for key, tensor in own.items()}
    casts: dict[Any, tuple[Tensor, Future[str | None] | None]] = {}  # tied weights have one storage, and stay so
    places = {}
    with ThreadPoolExecutor(_workers()) as pool:
        for key in list(weights):
            tensor, dtype = weights.pop(key), dtypes[key]
            place = places[key] = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), dtype)
            if place not in casts and tensor.dtype == dtype:
                casts[place] = tensor, None
            elif place not in casts:
                # Allocated here: what threads allocate lies in heaps of theirs, of which a tenth or more is wasted.
                new = torch.empty_like(tensor, dtype=dtype)
                casts[place] = new, pool.submit(_cast, tensor, new)
            del tensor
    module.load_state_dict({key: casts[place][0] for key, place in places.items()}, assign=True)
    for key, tensor in module.state_dict(keep_vars=True).items():
        cast = casts[places[key]][1]
        if cast is not None and (digest := cast.result()) is not None:
            _DIGESTS[tensor] = (_state(tensor), digest)
        if _AS_STORED in own[key].__dict__:
            setattr(tensor, _READ_IN, own[key].dtype)


def _cast(tensor: Tensor, new: Tensor) -> str | None:
    """Copy a tensor to one of another dtype; returns the digest of its values if that rounds them."""
    new.copy_(tensor)
    return None if torch.promote_types(tensor.dtype, new.dtype) == new.dtype else _tensor_digest(tensor)


def _workers() -> int:
    return min(8, os.cpu_count() or 1)


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether there is neither NaN nor infinity in tensors of one device: a bool there, so nothing is synchronized.

    Of a sharded tensor, this rank's share counts.
    """
    values = [local(tensor).detach() for tensor in tensors if tensor.is_floating_point()]
    values = [value for value in values if value.numel()]
    if not values:
        return torch.tensor(True)
    if values[0].is_cuda:  # a few kernels for all of them; on a CPU it would be the slower way
        extremes: Sequence[Tensor] = torch._foreach_norm(values, math.inf)  # type: ignore[attr-defined]
    else:
        extremes = [extreme for value in values for extreme in value.aminmax()]
    return torch.stack([extreme.float() for extreme in extremes]).isfinite().all()


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and stored buffers that must be finite: all but masks, which are buffers with minus infinity."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    state = module.state_dict()
    return {name: value for name, value in state.items() if name in parameters or not value.isneginf().any()}


def require_finite(module: nn.Module, source: str | Path) -> None:
    """Raise RunError that names the first weight of a module with NaN or infinity, and where it comes from."""
    values = values_of(module)
    if not all_finite(list(values.values())):
        name = next(name for name, tensor in values.items() if not all_finite([tensor]))
        raise RunError(f"{source} has NaN or infinity in {name}, so it computes nothing: train or download it again.")


def finite(values: Tensor, what: str) -> Tensor:
    """Return what a model has computed; raises RunError if there is NaN or infinity in it, which `what` then names."""
    if not all_finite([values]):
        raise RunError(
            f"{what} NaN or infinity, so there is no result: compute with trainer.precision=32-true, or train the "
            "model again with a lower optim.lr."
        )
    return values


def content_hash(module: nn.Module, trained: bool = False) -> str:
    """SHA-256 over the names, shapes and all values of a module's state dict.

    It is the identity of weights as they are stored. A part may be stored in fewer bits than it is read in, so bf16,
    fp16 and fp8 values are hashed as the fp32 numbers that they are: the hash does not depend on the device, the memory
    layout, or a lossless widening. Nor does it depend on the dtype that `fill` rounds to, which notes what was stored;
    it does depend on a later rounding. One core hashes about 2 GB/s, in which case 7 billion parameters take 14 s;
    tensors are shared among the cores, and one that has not changed is not hashed again.

    Args:
        module: with weights.
        trained: hash the present values of all tensors: a strategy may have changed them where that cannot be noticed.
    """
    known = None if trained else _IDENTITIES.get(module)
    return known or hash_of(module.state_dict(keep_vars=True), trained)


def note_identity(module: nn.Module, digest: str) -> None:
    """Let `content_hash` return `digest` for a module: of what its weights were computed from, where that rounds them
    (4-bit weights, or the sum of weights and an adapter)."""
    _IDENTITIES[module] = digest


def hash_of(tensors: Mapping[str, Tensor], trained: bool = False) -> str:
    """SHA-256 of a state dict, see `content_hash`; a tensor that is detached counts as another one."""
    state = sorted(tensors.items())
    known = [None if trained else _known_digest(tensor) for _, tensor in state]
    with ThreadPoolExecutor(_workers()) as pool:
        new = iter(pool.map(_tensor_digest, [tensor for (_, tensor), old in zip(state, known, strict=True) if not old]))
        digests = [old or next(new) for old in known]
    for (_, tensor), digest in zip(state, digests, strict=True):
        _DIGESTS[tensor] = (_state(tensor), digest)
    facts = [f"{name} {list(tensor.shape)} {digest}" for (name, tensor), digest in zip(state, digests, strict=True)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _known_digest(tensor: Tensor) -> str | None:
    """The digest of a tensor whose values have not changed since it was taken."""
    noted = _DIGESTS.get(tensor)
    return noted[1] if noted and noted[0] == _state(tensor) is not None else None


def _state(tensor: Tensor) -> tuple[Any, ...] | None:
    """What changes with a tensor's values: torch counts writes, except in inference mode."""
    return None if tensor.is_inference() else (tensor._version, tensor.data_ptr(), tensor.dtype)


def _tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values, floating-point ones of at most 32 bits as fp32."""
    widened = tensor.dtype.is_floating_point and tensor.dtype != torch.float64
    dtype = torch.float32 if widened else tensor.dtype
    digest = hashlib.sha256(str(dtype).encode())
    # One buffer for all chunks: as many allocations would leave holes of several times its size.
    buffer = torch.empty(min(CHUNK, tensor.numel()), dtype=dtype, device="cpu")
    for chunk in tensor.detach().reshape(-1).split(CHUNK):
        if chunk.device.type != "cpu" or chunk.dtype != dtype:
            chunk = buffer[: len(chunk)].copy_(chunk)
        digest.update(chunk.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a part's folder, by its path in the folder; neither its card nor hidden files."""
    return {name: _file_hash(folder / name) for name in _files(folder)}


def verify_files(folder: Path, weights: bool = True) -> None:
    """Compare a part's folder with its card; a folder without one, such as a download, is not checked.

    Args:
        folder: of an artifact.
        weights: whether files of weights are compared, too; a tokenizer's files take no time.

    Raises:
        RunError: a file that changed, is missing, or was added.
    """
    if not (folder / CARD).is_file():
        return
    advice = f"restore {folder} from a copy, or train the part again"
    try:
        hashes = json.loads((folder / CARD).read_text(encoding="utf-8")).get("files")
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{folder / CARD} cannot be read ({error}): {advice}.") from None
    if hashes is None:
        text = "has no hashes: it is from an earlier version of mmlab, so a damaged file would not be noticed"
        print(f"WARNING: {folder / CARD} {text}.", file=sys.stderr)
        return
    names = _files(folder)
    for name in sorted({*hashes, *names}):
        if name not in names:
            raise RunError(f"{folder / name} is missing, which the run wrote: {advice}.")
        if name not in hashes:
            raise RunError(f"{folder / name} was added after the run wrote the folder: remove it.")
        if (weights or not name.endswith(WEIGHTS)) and _file_hash(folder / name) != hashes[name]:
            raise RunError(f"{folder / name} has changed since the run wrote it: {advice}.")


def _files(folder: Path) -> list[str]:
    """Paths of all files in a folder that a model may be read from: neither hidden ones nor the README of a hub."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    hidden = {path for path in files if any(name.startswith(".") for name in path.parts)}
    return [path.as_posix() for path in files if path not in hidden and path.name not in (CARD, "README.md")]


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
