"""Reading a whole shard into its table: samples, positions of their members, checksums, sizes and text lengths."""

import os
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmlab.config.errors import DataError, nearest
from mmlab.config.locations import Location, location
from mmlab.data.formats import (
    EXTENSIONS,
    foreign_kind,
    parse_record,
    pictures_among,
    question_types,
    record_texts,
    record_type,
    split_name,
)
from mmlab.data.images import size_in
from mmlab.data.sample_types import SampleError
from mmlab.data.scan_notes import MOST_TYPES, ScanNotes
from mmlab.data.shard_table import About, ShardTable, content_hash, key_hash
from mmlab.data.tar import TarMember, fail, walk

_INT32 = np.iinfo(np.int32).max
_COMPRESSED_TARS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def scan_shard(
    path: Path, required: tuple[str, ...] = (), etag: str | None = None, copy_of: Location | None = None
) -> ShardTable:
    """Read a whole shard.

    Args:
        path: the tar file.
        required: members that each sample must have; `jpg|png` requires one of them.
        etag: of the object that the file is a copy of, see `About`.
        copy_of: that object, for errors.

    Raises:
        DataError: naming the shard, the byte and the reason, for whatever `walk` raises, a member that is required but
            missing, or there twice, or members of a key that are not adjacent.
    """
    keys, seen, first, members, summaries = [], set(), [], [], []
    skipped, bad_records, types = Counter[str](), dict[str, str](), Counter[str]()
    sample: dict[str, bytes] = {}
    place = copy_of or path
    close = partial(_close, required=required, path=place, bad_records=bad_records, types=types)
    with open(path, "rb") as file:
        fd = file.fileno()
        for member in walk(fd, place):
            parts, foreign = split_name(member.name), foreign_kind(member.name)
            if parts is None or foreign is not None:
                skipped[foreign if foreign and foreign.isprintable() else repr(foreign)] += 1
                continue
            key, extension = parts
            if not keys or key != keys[-1]:
                if key in seen:
                    why = f"the members of {key!r} are not adjacent, or the key is used twice"
                    fail(place, member.header, f"member {member.name!r}: {why}")
                if keys:
                    summaries.append(close(sample, keys[-1], at=member.header))
                seen.add(key)
                keys.append(key)
                first.append(len(members))
                sample = {}
            if extension in sample:
                fail(place, member.header, f"sample {key!r} has the member .{extension} twice")
            data = _read(fd, member, place)
            sample[extension] = data
            members.append((EXTENSIONS.index(extension), member.offset, member.size, zlib.crc32(data)))
        size = os.fstat(fd).st_size
        if keys:
            summaries.append(close(sample, keys[-1], at=size))
    arrays = _arrays(keys, [*first, len(members)], members, summaries)
    names, arrays["type_codes"] = _type_codes([kind for _, _, kind in summaries])
    about = About(size, etag, required, names, content_hash(arrays), ScanNotes.of(skipped, bad_records, types))
    return ShardTable(about=about, **arrays)


def _arrays(
    keys: list[str],
    first: list[int],
    members: list[tuple[int, int, int, int]],
    summaries: list[tuple[list[tuple[int, int]], int, str]],
) -> dict[str, Any]:
    """The arrays of a table but for `type_codes`; summaries are those of `_close`."""
    table, encoded = np.array(members, np.int64).reshape(-1, 4), [key.encode() for key in keys]
    sizes = [sizes for sizes, _, _ in summaries]
    return {
        "key_bytes": np.frombuffer(b"".join(encoded), np.uint8),
        "key_ends": np.cumsum([len(key) for key in encoded], dtype=np.int64),
        "key_hashes": np.array([key_hash(key) for key in keys], np.uint64),
        "first": np.array(first, np.int64),
        "extension": table[:, 0].astype(np.uint8),
        "offset": table[:, 1],
        "length": table[:, 2],
        "crc": table[:, 3].astype(np.uint32),
        "image_sizes": np.array([one[0] for one in sizes], np.int32).reshape(-1, 2),
        "further_sizes": np.array([size for one in sizes for size in one[1:]], np.int32).reshape(-1, 2),
        "text_lengths": np.array([length for _, length, _ in summaries], np.int32),
    }


def _type_codes(types: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and codes; no names for a shard whose `type` has too many values to be a response type."""
    names = sorted(set(types))
    if len(names) > MOST_TYPES:
        return (), np.zeros(len(types), np.uint8)
    code = {name: i for i, name in enumerate(names)}
    return tuple(names), np.array([code[kind] for kind in types], np.uint8)


def list_shards(folder: Path) -> list[Path]:
    """The `.tar` files of a folder, sorted by name."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_file(entry))
    files = [folder / name for name in names]
    for path in files:
        refuse_compressed(path)
    return [path for path in files if path.name.endswith(".tar")]


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a link to one; most folders state that, without a look at each file."""
    return entry.is_file(follow_symlinks=False) or Path(entry.path).is_file()


def refuse_compressed(path: Location) -> None:
    """Raise DataError for the name of a compressed tar."""
    if path.name.endswith(_COMPRESSED_TARS):
        raise DataError(f"{path} is compressed; decompress it to a plain .tar first.")


def local_folder(root: str | Location) -> Path:
    """Return `root` as the path of an existing local folder, or raise DataError."""
    folder = Path(str(location(root)))
    if folder.is_file():
        raise DataError(f"{folder} is a file; give the folder that holds the .tar files.")
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise DataError(f"there is no folder {folder}.{nearest(folder.name, siblings)}")
    return folder


def _read(fd: int, member: TarMember, path: Location) -> bytes:
    data = os.pread(fd, member.size, member.offset)
    if len(data) != member.size:
        fail(path, member.offset, f"member {member.name!r} could not be read completely")
    return data


def _close(
    sample: dict[str, bytes],
    key: str,
    required: tuple[str, ...],
    path: Location,
    at: int,
    bad_records: dict[str, str],
    types: Counter[str],
) -> tuple[list[tuple[int, int]], int, str]:
    """Check a complete sample and return the sizes of its pictures, its text length and its response type.

    Without a picture there is one size, 0, 0. A record that cannot be used counts as empty, because the reader will
    replace and count the sample.
    """
    for names in required:
        if not any(name in sample for name in names.split("|")):
            has = ", ".join(f".{name}" for name in sample)
            fail(path, at, f"sample {key!r} has no .{names.replace('|', ' or .')} (it has {has})")
    sizes = [_image_size(sample[name]) for name in pictures_among(sample)] or [(0, 0)]
    record: dict[str, Any] = {}
    try:
        record = parse_record(sample)
    except SampleError as error:
        bad_records[key] = str(error)
    types.update(question_types(record))
    return sizes, sum(map(len, record_texts(record))), record_type(record)


def _image_size(data: bytes) -> tuple[int, int]:
    """Width and height, upright; 0, 0 for an unreadable image, which the reader will replace and count."""
    try:
        width, height = size_in(data)
    except Exception:  # Pillow's parsers raise nearly anything on broken bytes
        return 0, 0
    return min(width, _INT32), min(height, _INT32)
