"""The weight files of a checkpoint in a folder or on the hub, in each layout that the hub has.

Weights are `model.safetensors`, or else `pytorch_model.bin`, each as one file or as shards with an index, or else
`model.fp16.safetensors`, as some pipelines of diffusers have them. Their tensors are mapped to memory: pages are read
when they are needed and belong to the file, so processes of one machine share them. A write to a tensor copies its page
and never changes the file. `pytorch_model.bin` is a pickle, of which torch rebuilds tensors and plain containers only;
a file that names anything else is refused, so nothing in it is executed.
"""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from mmlab.config.errors import ConfigError

SAFETENSORS, PICKLED, HALF = "model.safetensors", "pytorch_model.bin", "model.fp16.safetensors"
LFS_POINTER = b"version https://git-lfs"


def split_gguf(source: str | Path) -> tuple[str, str | None]:
    """Return (folder or hub name, name of a GGUF file in it), None for a source that is not a GGUF file."""
    source = os.path.expanduser(source)
    path = Path(source)
    return (str(path.parent), path.name) if path.suffix == ".gguf" else (source, None)


def check_gguf(source: str | Path) -> None:
    """Raise ValueError for a GGUF file that a local folder does not have; the message lists those that it has."""
    folder, name = split_gguf(source)
    path = Path(folder)
    if name is not None and path.is_dir() and not (path / name).is_file():
        there = sorted(each.name for each in path.glob("*.gguf"))
        raise ValueError(f"there is no such file; its folder has {', '.join(there) or 'no GGUF file'}.")


def read_checkpoint(source: str | Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Map the tensors of a checkpoint whose names begin with one of `prefixes`, in the dtypes in which they are stored.

    Args:
        source: hub name or local folder.
        prefixes: beginnings of names; shards without such a name are neither downloaded nor opened.

    Raises:
        ValueError: no weights, a missing or damaged file, or one that holds more than tensors.
        OSError: a file cannot be read or downloaded.
    """
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(source, prefixes):
        tensors |= read_file(path, prefixes)
    return tensors


def read_file(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Map the tensors of one file, safetensors or a pickle of torch; see `read_checkpoint`."""
    _refuse_pointer(path)
    return (_read_safetensors if path.suffix == ".safetensors" else _read_pickle)(path, prefixes)


def _weight_files(source: str | Path, prefixes: tuple[str, ...]) -> list[Path]:
    """Paths of the files that hold names with such prefixes; those on the hub are downloaded."""
    for name in (SAFETENSORS, PICKLED, HALF):
        if path := find(source, name):
            return [path]
        if index := find(source, f"{name}.index.json"):
            try:
                places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                shards = sorted({Path(shard).as_posix() for key, shard in places.items() if key.startswith(prefixes)})
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index.name} cannot be read ({error}).") from error
            return [_shard(source, index, shard) for shard in shards]
    raise ValueError(f"it has no {SAFETENSORS} or {PICKLED}, nor an index of their shards{_what_is_there(source)}.")


def find(source: str | Path, name: str) -> Path | None:
    """Where a file is, None if the source does not have it; a hub's file is downloaded."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return path if (path := folder / name).is_file() else None
    found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a config; None if there is no such file.

    Raises:
        ConfigError: it cannot be read, or is not a mapping.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a mapping.")
    return content


def _shard(source: str | Path, index: Path, name: str) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{index.name} names a file outside the checkpoint: {name}.")
    if path := find(source, name):
        return path
    raise ValueError(f"{index.name} names {name}, which is missing; download the whole checkpoint.")


def _what_is_there(source: str | Path) -> str:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return ""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    if gguf:
        return f"; to load its GGUF file, set source={folder / gguf}"
    return f"; it has {', '.join(names[:12])}{', …' if len(names) > 12 else ''}" if names else "; it is empty"


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path.name} is a pointer of Git LFS, not the weights; run `git lfs pull` in its folder.")


def _read_safetensors(path: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.offset_keys() if key.startswith(prefixes)}
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or incomplete ({error}); download it again.") from error


def _read_pickle(path: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        # Files of torch before 1.6 are not zip archives, and cannot be mapped.
        state = torch.load(path, "cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # a damaged pickle raises whatever its opcodes lead to
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path.name} holds more than tensors: it names {named[1]}, and code of a checkpoint is never run; use "
                f"a {SAFETENSORS} of the same weights."
            ) from error
        raise ValueError(f"{path.name} is damaged or incomplete; download it again.") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path.name} holds no weights by name, but a {type(state).__name__}.")
    tensors = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return {key: value.detach() for key, value in tensors.items() if key.startswith(prefixes)}
