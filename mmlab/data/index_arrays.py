"""The arrays of an index as a file: written atomically, and read without trusting the sizes that it states."""

import math
import sys
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from mmlab.config.disk_errors import refusal
from mmlab.config.errors import DataError, RunError
from mmlab.data.formats import EXTENSIONS, IMAGE_EXTENSIONS, PICTURES
from mmlab.runs.disk import replacing
from mmlab.runs.index_files import index_files

_LONGEST_HEADER = 4096


def write_arrays(folder: Path, arrays: dict[str, Any], elsewhere: bool) -> Path:
    """Write the index of a folder of shards and return its path.

    Args:
        folder: of the shards.
        arrays: by name.
        elsewhere: write it into the user's cache if the folder does not allow it.

    Raises:
        RunError: the disk does not allow it.
    """
    beside, other = index_files(folder)
    try:
        return _write(beside, arrays)
    except RunError as error:
        if not elsewhere:
            raise
        try:
            _write(other, arrays)
        except RunError:
            raise error from None
        print(f"the index of {folder} is in {other}: {refusal(error) or error}", file=sys.stderr)
        return other


def _write(path: Path, arrays: dict[str, Any]) -> Path:
    with replacing(path) as draft, draft.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    return path


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a file.

    Raises:
        DataError: no such file as `write_arrays` writes; sizes are compared with the file's before memory is reserved.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > path.stat().st_size:
                    raise ValueError(f"{member.filename} is compressed")
                with archive.open(member) as file:
                    _check_size(file, member.file_size)
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # a damaged zip or header can raise almost anything
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())}).") from None


def picture_counts(first: np.ndarray, extension: np.ndarray) -> np.ndarray:
    """Number of pictures of each sample, as `pictures_among` returns them.

    Args:
        first: int64 `[N + 1]`, see `Members`.
        extension: uint8 `[M]`.

    Returns:
        int64 `[N]`.
    """
    stems = list(dict.fromkeys(name.rpartition(".")[0] for name in PICTURES))
    number = [stems.index(name.rpartition(".")[0]) if name in PICTURES else -1 for name in EXTENSIONS]
    numbers = np.array(number)[extension]
    samples = np.repeat(np.arange(len(first) - 1), np.diff(first))
    shown = np.unique((samples * len(stems) + numbers)[numbers >= 0])  # of several kinds, one counts
    return np.bincount(shown // len(stems), minlength=len(first) - 1)


def check_arrays(index: Any) -> None:
    """Check that the arrays of a `ShardIndex` fit each other; a wrong length would be read into memory.

    Raises:
        ValueError: they do not.
    """
    members, n, m = index.members, len(index.keys), len(index.members.extension)
    shapes = {
        "shard_sizes": (len(index.shards),),
        "samples_per_shard": (len(index.shards),),
        "image_sizes": (n, 2),
        "text_lengths": (n,),
        "type_codes": (n,),
    }
    fit = all(getattr(index, name).shape == shape for name, shape in shapes.items())
    fit = fit and all(getattr(members, name).shape == (m,) for name in ("extension", "offset", "length", "crc"))
    fit = fit and n > 0 and (index.samples_per_shard >= 0).all() and index.samples_per_shard.sum() == n
    fit = fit and members.first.shape == (n + 1,) and members.first[0] == 0 and members.first[-1] == m
    fit = fit and (np.diff(members.first) >= 0).all()
    if not fit or members.extension.max() >= len(EXTENSIONS) or index.type_codes.max() >= len(index.type_names):
        raise ValueError("its arrays do not fit each other")
    several = members.extension.max() >= EXTENSIONS.index(PICTURES[len(IMAGE_EXTENSIONS)])
    if index.further_sizes.shape != (int((index.pictures.clip(1) - 1).sum()) if several else 0, 2):
        raise ValueError("it lacks the sizes of further pictures")
    sizes = index.shard_sizes.repeat(index.samples_per_shard).repeat(np.diff(members.first))
    if (members.offset < 0).any() or (members.length < 0).any() or (members.offset > sizes - members.length).any():
        raise ValueError("it names places outside its shards")


def _check_size(file: IO[bytes], size: int) -> None:
    """Compare the shape in an array's header with the bytes that follow it."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file, max_header_size=_LONGEST_HEADER)
    if dtype.hasobject or file.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"an array states {shape} values of {dtype}, which do not fit into {size} bytes")
