"""One shard as arrays: samples, positions of their members, checksums, image sizes and text lengths."""

import os
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from mmlab.config.errors import DataError, nearest
from mmlab.data.formats import EXTENSIONS, IMAGE_EXTENSIONS, parse_record, record_texts, record_type, split_name
from mmlab.data.images import open_image
from mmlab.data.progress_bar import progress
from mmlab.data.sample_types import SampleError
from mmlab.data.tar import TarMember, fail, walk

_INT32 = np.iinfo(np.int32).max
_COMPRESSED_TARS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class ShardScan:
    """The contents of one shard. N samples, M members; sample i owns members `first[i]:first[i + 1]`."""

    size: int  # bytes of the shard file
    keys: list[str]  # [N]
    first: np.ndarray  # int64 [N + 1]
    extension: np.ndarray  # uint8 [M], an index into `EXTENSIONS`
    offset: np.ndarray  # int64 [M], first byte of the member's data
    length: np.ndarray  # int64 [M]
    crc: np.ndarray  # uint32 [M]
    image_sizes: np.ndarray  # int32 [N, 2]: width, height; 0, 0: no image, or an unreadable header
    text_lengths: np.ndarray  # int32 [N]: characters of all texts of the record
    types: list[str]  # [N]: response type of each record, or empty


def scan_shard(path: Path, required: tuple[str, ...] = ()) -> ShardScan:
    """Read a whole shard.

    Args:
        path: the tar file.
        required: members that each sample must have; `jpg|png` requires one of them.

    Raises:
        DataError: naming the shard, the byte and the reason, for whatever `walk` raises, an unsafe key, a member
            that is not in `EXTENSIONS`, missing or there twice, or members of a key that are not adjacent.
    """
    keys, seen, first, members, images, texts = [], set(), [], [], [], []
    types: list[str] = []
    sample: dict[str, bytes] = {}
    with open(path, "rb") as file:
        fd = file.fileno()
        for member in walk(fd, path):
            key, extension = _named(member, path)
            if not keys or key != keys[-1]:
                if key in seen:
                    fail(path, member.header, f"the members of {key!r} are not adjacent, or the key is used twice")
                if keys:
                    _close(sample, keys[-1], required, path, member.header, images, texts, types)
                seen.add(key)
                keys.append(key)
                first.append(len(members))
                sample = {}
            if extension in sample:
                fail(path, member.header, f"sample {key!r} has the member .{extension} twice")
            data = _read(fd, member, path)
            sample[extension] = data
            members.append((EXTENSIONS.index(extension), member.offset, member.size, zlib.crc32(data)))
        size = os.fstat(fd).st_size
        if keys:
            _close(sample, keys[-1], required, path, size, images, texts, types)
    table = np.array(members, np.int64).reshape(-1, 4)
    return ShardScan(
        size=size,
        keys=keys,
        first=np.array([*first, len(members)], np.int64),
        extension=table[:, 0].astype(np.uint8),
        offset=table[:, 1],
        length=table[:, 2],
        crc=table[:, 3].astype(np.uint32),
        image_sizes=np.array(images, np.int32).reshape(-1, 2),
        text_lengths=np.array(texts, np.int32),
        types=types,
    )


def scan_shards(
    shards: list[Path], required: tuple[str, ...] = (), workers: int = 1, quiet: bool = False
) -> Iterator[ShardScan]:
    """Yield the `ShardScan` of each shard, in order; `workers` processes read them."""
    scan = partial(scan_shard, required=required)
    if workers <= 1:
        yield from progress(map(scan, shards), "reading shards", len(shards), quiet)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from progress(pool.map(scan, shards), "reading shards", len(shards), quiet)


def list_shards(folder: Path) -> list[Path]:
    """The `.tar` files of a folder, sorted by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for path in files:
        if path.name.endswith(_COMPRESSED_TARS):
            raise DataError(f"{path} is compressed; decompress it to a plain .tar first.")
    return [path for path in files if path.name.endswith(".tar")]


def local_folder(root: str | Path) -> Path:
    """Return `root` as the path of an existing local folder, or raise DataError."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", str(root)):
        raise DataError(f"'{root}' is not a local folder: shards are never read from commands or URLs; copy them here.")
    folder = Path(root).expanduser()
    if folder.is_file():
        raise DataError(f"{folder} is a file; give the folder that holds the .tar files.")
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise DataError(f"there is no folder {folder}.{nearest(folder.name, siblings)}")
    return folder


def _named(member: TarMember, path: Path) -> tuple[str, str]:
    try:
        return split_name(member.name)
    except DataError as error:
        fail(path, member.header, str(error))


def _read(fd: int, member: TarMember, path: Path) -> bytes:
    data = os.pread(fd, member.size, member.offset)
    if len(data) != member.size:
        fail(path, member.offset, f"member {member.name!r} could not be read completely")
    return data


def _close(sample, key: str, required, path: Path, at: int, images: list, texts: list, types: list) -> None:
    """Check a complete sample and append its image size, text length and response type."""
    for names in required:
        if not any(name in sample for name in names.split("|")):
            has = ", ".join(f".{name}" for name in sample)
            fail(path, at, f"sample {key!r} has no .{names.replace('|', ' or .')} (it has {has})")
    images.append(next((_image_size(sample[name]) for name in IMAGE_EXTENSIONS if name in sample), (0, 0)))
    record = _record(sample)
    texts.append(sum(map(len, record_texts(record))))
    types.append(record_type(record))


def _image_size(data: bytes) -> tuple[int, int]:
    """Width and height from the header; 0, 0 for an unreadable image, which the reader will replace and count."""
    try:
        width, height = open_image(data).size
    except Exception:  # Pillow's parsers raise nearly anything on broken bytes
        return 0, 0
    return min(width, _INT32), min(height, _INT32)


def _record(sample: dict[str, bytes]) -> dict[str, Any]:
    """The record; an empty one for a broken record, which the reader will replace and count."""
    try:
        return parse_record(sample)
    except SampleError:
        return {}
