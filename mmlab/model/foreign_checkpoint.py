"""Tensors of a checkpoint that holds other objects, too: what it names is neither imported nor run.

A `.ckpt` of Lightning is a zip archive with a pickle and the bytes of its tensors. torch's own reader refuses the whole
file for one class that it does not know, such as a callback or a config beside the weights. Here such an object becomes
an empty one, and only tensors and plain containers are rebuilt.
"""

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass
class StoredTensor:
    """A tensor whose bytes are not read yet: a checkpoint holds an optimizer's state, too."""

    key: str
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Foreign:
    """Stands for any other object: takes all that a pickle does to one, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Foreign":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def _nothing(self, *args: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = _nothing

    def __call__(self, *args: Any) -> "Foreign":
        return Foreign()


class _Rebuild:
    """Collects the arguments of torch's functions that rebuild tensors."""

    def __init__(self, parameter: bool = False):
        self.parameter = parameter

    def __call__(self, storage: Any, *args: Any) -> Any:
        if self.parameter or not isinstance(storage, tuple):  # of a parameter: its data
            return storage
        offset, size, stride = args[:3]
        return StoredTensor(storage[0], storage[1], int(offset), tuple(map(int, size)), tuple(map(int, stride)))

    def __setstate__(self, state: Any) -> None: ...


class _Reader(pickle.Unpickler):
    """Resolves no name but those of tensors and of `OrderedDict`."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.rebuilt = {
            "torch._utils._rebuild_tensor_v2": _Rebuild(),
            "torch._utils._rebuild_tensor": _Rebuild(),
            "torch._utils._rebuild_parameter": _Rebuild(parameter=True),
        }

    def find_class(self, module: str, name: str) -> Any:
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (known := self.rebuilt.get(f"{module}.{name}")) is not None:
            return known
        return type(name.rpartition(".")[2] or "Foreign", (Foreign,), {"__module__": module})

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, *_ = pid
        return (str(key), dtype) if kind == "storage" and isinstance(dtype, torch.dtype) else Foreign()


class ForeignCheckpoint:
    """A checkpoint file; `content` is what it holds, with a `StoredTensor` for every tensor.

    Args:
        path: a file of `torch.save`, in the format of torch 1.6 and later.

    Raises:
        ValueError: a file of another kind, or a damaged one.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        with ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError("it holds no data.pkl")
            self._folder = pickles[0].removesuffix("data.pkl")
            try:
                self.content: Any = _Reader(archive.read(pickles[0])).load()
            except Exception as error:  # a damaged pickle raises whatever its opcodes lead to
                raise ValueError(f"its pickle is damaged ({type(error).__name__})") from error

    def tensors(self, stored: dict[str, StoredTensor]) -> dict[str, Tensor]:
        """Read tensors, each contiguous and of its own.

        Raises:
            ValueError: bytes that are missing, or fewer than a tensor needs.
        """
        storages: dict[str, bytearray] = {}
        tensors = {}
        with ZipFile(self.path) as archive:
            for name, each in stored.items():
                try:
                    if each.key not in storages:
                        storages[each.key] = bytearray(archive.read(f"{self._folder}data/{each.key}"))
                    flat = torch.frombuffer(storages[each.key], dtype=each.dtype)
                    tensors[name] = flat.as_strided(each.size, each.stride, each.offset).clone()
                except (KeyError, BadZipFile, RuntimeError, ValueError, OverflowError) as error:
                    raise ValueError(f"the bytes of {name} are missing or damaged") from error
        return tensors
